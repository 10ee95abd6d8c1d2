"""Layer norms with shift and scale as one operation."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.runtime.cuda.rewritten import calls_of, check, names
from xfuser_runtime.cuda.norms import (
    modulated_norm,
    modulated_norm_of_exact_sum,
    modulated_norm_of_sum,
)
from xfuser_runtime.cuda.passes import CodePass

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


def behind_a_sum(x: torch.Tensor, made: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x = x + y.sin() / 1.0
    return x * one_stream(x, made)


def behind_a_gated_sum(
    x: torch.Tensor, made: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    gate = made[:, None, :CHANNELS].sin()
    x = gate * y.sin() + x
    return x * one_stream(x, made)


@pytest.mark.parametrize("call", [behind_a_sum, behind_a_gated_sum])
@pytest.mark.parametrize("for_compiler", [True, False])
def test_with_the_sum(call: Callable[..., Any], for_compiler: bool) -> None:
    kernels = check(call, rows(), modulation(), rows(), for_compiler=for_compiler)
    assert names(kernels) == ["modulated_norm_of_sum"]
    assert (kernels[0].args[2] is None) == (call is behind_a_sum)


def summed_again(x: torch.Tensor, made: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x = x + y
    return x + one_stream(x, made)


@pytest.mark.parametrize("for_compiler", [True, False])
def test_the_exact_sum(for_compiler: bool) -> None:
    """What the compiler makes anew for another sum is not rounded for the norm either."""
    arguments = rows(), modulation(), rows()
    kernels = check(summed_again, *arguments, for_compiler=for_compiler)
    what = "exact_sum" if for_compiler else "sum"
    assert names(kernels) == [f"modulated_norm_of_{what}"]


@pytest.mark.parametrize("rewrites", [True, False])
def test_compiled_code_rounds_the_stream_once(rewrites: bool) -> None:
    """256 + 1 + 1 is 258, whose half way no number of bf16 is: rounded, it is 256 again."""
    ones = torch.ones(BATCH, IMAGE, CHANNELS, dtype=torch.bfloat16)
    arguments = 256 * ones, torch.zeros_like(ones[:, 0].repeat(1, 2)), ones

    def block(x: torch.Tensor, made: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x + y
        return x + (one_stream(x, made) + 1).clamp(1, 1)

    options: Any = {"pre_grad_custom_pass": CodePass()} if rewrites else {}
    torch.compiler.reset()
    assert torch.equal(torch.compile(block, options=options)(*arguments), 258 * ones)
    assert torch.equal(block(*arguments), 256 * ones)


def read_before(x: torch.Tensor, made: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x = x + y
    first = x.sin()
    return first + one_stream(x, made)


def written_between(
    x: torch.Tensor, made: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    made = made.clone()
    x = x + y
    made.mul_(2)
    return x + one_stream(x, made)


def norm_read_again(
    x: torch.Tensor, made: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    scale, shift = made[:, None].chunk(2, dim=2)
    normed = norm(x + y)
    return normed * (1 + scale) + shift + normed


def of_wider_rows(x: torch.Tensor, made: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x = x + y[:, :1]
    return x + one_stream(x, made)


@pytest.mark.parametrize(
    "call", [read_before, written_between, norm_read_again, of_wider_rows]
)
def test_other_sums_stay(call: Callable[..., Any]) -> None:
    assert not check(call, rows(), modulation(), rows())


def divided(x: torch.Tensor, made: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x / 1.0 + y / 2.0


def kept_as_it_was(
    x: torch.Tensor, made: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    x = x + y
    quotient = x / 1.0
    x.mul_(2)
    return x + quotient


def of_another_type(
    x: torch.Tensor, made: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    return x + y.long() / 1


@pytest.mark.parametrize(
    ("call", "count"), [(divided, 1), (kept_as_it_was, 1), (of_another_type, 1)]
)
def test_divisions_by_one(call: Callable[..., Any], count: int) -> None:
    calls = calls_of(call, rows(), modulation(), rows(), for_compiler=False)
    assert sum(node.target is operator.truediv for node in calls) == count


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
    check_rounding(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("channels", [8, 72, 1152, 3072])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("gated", [True, False])
def test_the_kernels_of_sums(channels: int, dtype: torch.dtype, gated: bool) -> None:
    """Against doubles."""
    terms = sum_and_modulation(channels, dtype, gated)
    on_gpu = [None if x is None else x.cuda() for x in terms]
    total, normed = modulated_norm_of_sum(*on_gpu, 1e-6)  # type: ignore[arg-type]
    check_rounding(total.cpu(), exact_sum(terms))
    check_norm(normed.cpu(), total.cpu().double(), terms)
    exact = modulated_norm_of_exact_sum(*on_gpu, 1e-6)  # type: ignore[arg-type]
    check_norm(exact.cpu(), exact_sum(terms), terms)


def test_a_sum_is_rounded_or_not() -> None:
    """The channels beside two large ones tell whether these were rounded."""
    terms = sum_and_modulation(72, torch.bfloat16, gated=True)
    total, normed = modulated_norm_of_sum(*terms, 1e-6)  # type: ignore[arg-type]
    exact = modulated_norm_of_exact_sum(*terms, 1e-6)  # type: ignore[arg-type]
    check_norm(normed, total.double(), terms)
    check_norm(exact, exact_sum(terms), terms)
    with pytest.raises(AssertionError):
        check_norm(normed, exact_sum(terms), terms)
    with pytest.raises(AssertionError):
        check_norm(exact, total.double(), terms)


def sum_and_modulation(
    channels: int, dtype: torch.dtype, gated: bool
) -> tuple[torch.Tensor | None, ...]:
    """Residual, rows, gate, scale and shift.

    Two channels are large, and their sums of 257 and -257 none that bf16 has. The shift is small,
    as the others' norms are then.
    """
    residual, added = 3 + torch.randn(2, BATCH, IMAGE, channels).to(dtype)
    residual[..., :2], added[..., :2] = (torch.tensor([x, -x]) for x in (256, 1))
    added = added.transpose(0, 1).contiguous().transpose(0, 1)
    gate, scale, shift = torch.randn(BATCH, 1, 3 * channels).to(dtype).chunk(3, -1)
    gate[..., :2] = 1
    return residual, added, gate if gated else None, scale, shift / 64


def exact_sum(terms: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
    residual, added, gate = (None if x is None else x.double() for x in terms[:3])
    assert residual is not None and added is not None
    return residual + (added if gate is None else gate * added)


def check_norm(
    found: torch.Tensor, total: torch.Tensor, terms: tuple[torch.Tensor | None, ...]
) -> None:
    """The modulated norm of a sum in doubles."""
    scale, shift = (x.double() for x in terms[3:] if x is not None)
    expected = modulated_norm([total], scale, shift, 1e-6)
    check_rounding(found, expected)
    # Roundings of single numbers do not add up to a scale of all but the large ones.
    scaled, expected = ((x - shift)[..., 2:] for x in (found.double(), expected))
    assert abs((scaled * expected).sum() / (expected**2).sum() - 1) < 2e-3


def check_rounding(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found - expected).norm() / expected.norm()
    is_single = found.dtype == torch.float32
    assert error < (1e-5 if is_single else torch.finfo(found.dtype).eps)
