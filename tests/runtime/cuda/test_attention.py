"""Which kernel computes attention, and what becomes of torch's calls in a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.runtime.cuda.rewritten import check, names
from xfuser_runtime.attention.backends import AttentionBackend, backend_names
from xfuser_runtime.attention.kernels import KernelCall, sdpa
from xfuser_runtime.config import EngineConfig, RuntimeConfig
from xfuser_runtime.cuda import attention, choice
from xfuser_runtime.cuda.choice import MIN_KEYS, is_faster
from xfuser_runtime.cuda.timing import agrees
from xfuser_runtime.distributed.runtime_state import (
    RuntimeState,
    initialize_runtime_state,
)

ROWS, HEADS, CHANNELS = 5, 2, 8
TORCH = AttentionBackend("sdpa", sdpa)


def heads(rows: int = MIN_KEYS, count: int = HEADS) -> torch.Tensor:
    return torch.randn(1, rows, count, CHANNELS).transpose(1, 2)


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2) + 1


def scaled(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=0.3
    )


def causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(key, key, value, None, 0.0, True)


@pytest.fixture
def with_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "timed_backends", lambda: ("flash_4",))


@pytest.mark.usefixtures("inference", "with_a_package")
@pytest.mark.parametrize("call", [plain, scaled, causal])
@pytest.mark.parametrize("for_compiler", [True, False])
def test_the_choice_is_left_open(call: Callable[..., Any], for_compiler: bool) -> None:
    tensors = (heads(ROWS), heads(), heads())
    assert names(check(call, *tensors, for_compiler=for_compiler)) == ["attention"]


def masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    mask = key[:, :, :, 0].unsqueeze(2) > 0
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def fewer(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key[:, :, 1:], value[:, :, 1:])


def grouped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        query, key[:, :1], value[:, :1], enable_gqa=True
    )


@pytest.mark.usefixtures("inference", "with_a_package")
@pytest.mark.parametrize("call", [masked, fewer, grouped])
def test_others_stay(call: Callable[..., Any]) -> None:
    assert not check(call, heads(ROWS), heads(), heads())


def of_a_named_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return plain(query, key, value)


@pytest.mark.usefixtures("inference", "with_a_package", "state")
def test_a_named_kernel_stays() -> None:
    assert not check(of_a_named_kernel, heads(ROWS), heads(), heads())
    named = RuntimeConfig(attention_backend="sdpa")
    initialize_runtime_state(EngineConfig(runtime_config=named, world_size=1))
    assert not check(plain, heads(ROWS), heads(), heads())


@pytest.mark.usefixtures("inference")
def test_without_a_package_nothing_changes() -> None:
    assert "flash_4" in backend_names() and not attention.timed_backends()
    assert not check(plain, heads(ROWS), heads(), heads())


@pytest.fixture
def times(state: RuntimeState, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the next kernels that are timed take, torch's own first."""
    found: list[float] = []
    monkeypatch.setattr(choice, "seconds_in_graph", lambda run: found.pop(0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return found


def call_of(rows: int = MIN_KEYS) -> KernelCall:
    return KernelCall(*(heads(rows).transpose(1, 2) for _ in range(3)))


def test_the_faster_one_is_taken_and_kept(times: list[float]) -> None:
    times += [2.0, 1.0, 1.0, 2.0, 1.0, 0.95]
    other = AttentionBackend("flash_4", sdpa)
    assert is_faster(other, TORCH, call_of())
    assert not is_faster(other, TORCH, call_of(MIN_KEYS + 1))
    assert not is_faster(other, TORCH, call_of(MIN_KEYS + 2))
    assert not times
    assert is_faster(other, TORCH, call_of())
    assert not is_faster(other, TORCH, call_of(MIN_KEYS - 1))


def test_no_random_number_is_drawn(times: list[float]) -> None:
    times += [2.0, 1.0]
    call, before = call_of(), torch.get_rng_state()
    is_faster(AttentionBackend("flash_4", sdpa), TORCH, call)
    assert torch.equal(torch.get_rng_state(), before)


def wrong(call: KernelCall, need_lse: bool) -> tuple[torch.Tensor, None]:
    return 1.1 * sdpa(call, need_lse)[0], None


def broken(call: KernelCall, need_lse: bool) -> tuple[torch.Tensor, None]:
    raise AssertionError("no such tile")


@pytest.mark.parametrize(
    ("kernel", "told"),
    [(wrong, "gives another result"), (broken, "no such tile")],
)
def test_a_kernel_that_fails_is_told(
    kernel: Any, told: str, times: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    times += [2.0, 1.0]
    assert not is_faster(AttentionBackend("flash_4", kernel), TORCH, call_of())
    assert told in caplog.text and "flash_4" in caplog.text


def test_nothing_is_timed_in_a_capture(
    times: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not is_faster(AttentionBackend("flash_4", sdpa), TORCH, call_of())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    times += [2.0, 1.0]
    assert is_faster(AttentionBackend("flash_4", sdpa), TORCH, call_of())


def test_results_agree_but_for_rounding() -> None:
    expected = torch.ones(4)
    assert agrees(expected * 1.001, expected)
    assert not agrees(expected * 1.1, expected)
    assert not agrees(expected * float("nan"), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("channels", [64, 72, 128])
def test_the_operator(channels: int, state: RuntimeState) -> None:
    """Whichever kernel is taken here, at first, from then on and in a capture."""
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = [
        torch.randn(
            (1, rows, 16, channels),
            generator=generator,
            device="cuda",
            dtype=torch.bfloat16,
        ).transpose(1, 2)
        for rows in (4096, MIN_KEYS, MIN_KEYS)
    ]
    expected = F.scaled_dot_product_attention(*(x.double() for x in tensors))
    graph = torch.cuda.CUDAGraph()
    results = [attention.attention(*tensors, False, None) for _ in range(2)]
    with torch.cuda.graph(graph):
        results.append(attention.attention(*tensors, False, None))
    graph.replay()
    assert all(agrees(found, expected) for found in results)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
