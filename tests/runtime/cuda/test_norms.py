"""Layer norms with shift and scale as one operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.runtime.cuda.rewritten import check, names
from xfuser_runtime.cuda.norms import modulated_norm

pytestmark = pytest.mark.usefixtures("inference")

BATCH, TEXT, IMAGE, CHANNELS = 2, 5, 9, 8


def rows(tokens: int = IMAGE) -> torch.Tensor:
    return 3 + torch.randn(BATCH, tokens, CHANNELS)


def modulation() -> torch.Tensor:
    return torch.randn(BATCH, 2 * CHANNELS)


def norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return F.layer_norm(x, (CHANNELS,), eps=eps)


def one_stream(x: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    scale, shift = made.chunk(2, dim=1)
    return norm(x, 1e-2) * (1 + scale[:, None]) + shift[:, None]


def of_a_table(x: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """Of one scale for all samples."""
    scale, shift = made[:1, None].chunk(2, dim=2)
    return norm(x) * (1 + scale) + shift


def two_streams(x: torch.Tensor, made: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    joined = torch.cat([x, y], dim=1)
    return joined + one_stream(joined, made)


@pytest.mark.parametrize(
    ("call", "more", "count"),
    [(one_stream, (), 1), (of_a_table, (), 1), (two_streams, (rows(TEXT),), 2)],
)
def test_one_operation(call: Callable[..., Any], more: Any, count: int) -> None:
    kernels = check(call, rows(), modulation(), *more)
    assert names(kernels) == ["modulated_norm"]
    assert len(kernels[0].args[0]) == count  # type: ignore[arg-type]


def of_what_is_computed(x: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    return one_stream(x.sin(), made)


def with_weights(x: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    scale, shift = made.chunk(2, dim=1)
    normed = F.layer_norm(x, (CHANNELS,), made[0, :CHANNELS])
    return normed * (1 + scale[:, None]) + shift[:, None]


def with_another_one(x: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    scale, shift = made.chunk(2, dim=1)
    return norm(x) * (2 + scale[:, None]) + shift[:, None]


def by_token(x: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    return norm(x) * (1 + x.sin()) + x


@pytest.mark.parametrize(
    "call", [of_what_is_computed, with_weights, with_another_one, by_token]
)
def test_others_stay(call: Callable[..., Any]) -> None:
    assert not check(call, rows(), modulation())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("channels", [8, 72, 1152, 3072])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("samples", [1, BATCH])
def test_the_kernel(channels: int, dtype: torch.dtype, samples: int) -> None:
    """Against doubles, at most as far off as the rounding of the result."""
    parts = [3 + torch.randn(BATCH, n, channels).to(dtype) for n in (TEXT, IMAGE)]
    parts[1] = parts[1].transpose(0, 1).contiguous().transpose(0, 1)
    scale, shift = torch.randn(samples, 2, 2 * channels).to(dtype)[:, :1].chunk(2, -1)
    expected = modulated_norm(
        [x.double() for x in parts], scale.double(), shift.double(), 1e-6
    )
    found = modulated_norm(
        [x.cuda() for x in parts], scale.cuda(), shift.cuda(), 1e-6
    ).cpu()
    error = (found - expected).norm() / expected.norm()
    assert error < (torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5)
