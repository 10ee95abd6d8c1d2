"""The kernels of modulated norms; apart, since Triton is there on GPUs alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from xfuser_runtime.cuda.kernel import dense, empty_joined, places

#: Channels that a warp holds.
WARP_CHANNELS = 1024
MAX_WARPS = 16


def launch(
    parts: Sequence[torch.Tensor], scale: torch.Tensor, shift: torch.Tensor, eps: float
) -> torch.Tensor:
    """`modulated_norm` on a GPU."""
    batch, _, channels = parts[0].shape
    out = empty_joined(parts, 1)
    width = triton.next_power_of_2(channels)
    scale, shift = (x.expand(batch, 1, channels) for x in (scale, shift))
    for rows, target, _ in places(parts, out, 1):
        _normalize[(rows.shape[1], batch)](
            rows,
            scale,
            shift,
            target,
            *rows.stride()[:2],
            *target.stride()[:2],
            *(x.stride(dim) for x in (scale, shift) for dim in (0, 2)),
            eps,
            CHANNELS=channels,
            WIDTH=width,
            num_warps=_warps(width),
        )
    return out


def launch_of_sum(
    residual: torch.Tensor,
    rows: torch.Tensor,
    gate: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    total: torch.Tensor | None,
) -> torch.Tensor:
    """The norm of `modulated_norm_of_sum` on a GPU; of the exact sum without a `total` for it."""
    batch, tokens, channels = residual.shape
    out = empty_joined([residual], 1)
    width = triton.next_power_of_2(channels)
    terms = [dense(x) for x in (residual, rows)]
    factors = [
        x.expand(batch, 1, channels)
        for x in (scale if gate is None else gate, scale, shift)
    ]
    _add_and_normalize[(tokens, batch)](
        *terms,
        *factors,
        out if total is None else total,
        out,
        *(stride for x in (*terms, out) for stride in x.stride()[:2]),
        *(x.stride(dim) for x in factors for dim in (0, 2)),
        eps,
        GATED=gate is not None,
        ROUNDED=total is not None,
        CHANNELS=channels,
        WIDTH=width,
        num_warps=_warps(width),
    )
    return out


def _warps(width: int) -> int:
    return min(MAX_WARPS, max(1, width // WARP_CHANNELS))


@triton.jit
def _normalize(  # type: ignore[no-untyped-def]
    rows,
    scale,
    shift,
    out,
    rows_0,
    rows_1,
    out_0,
    out_1,
    scale_0,
    scale_2,
    shift_0,
    shift_2,
    eps,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row; offsets in 64 bits, since videos pass 2 ** 31 numbers."""
    token, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    inside = channel < CHANNELS
    read = tl.load(
        rows + sample * rows_0 + token * rows_1 + channel, mask=inside, other=0.0
    )
    factor = tl.load(scale + sample * scale_0 + channel * scale_2, mask=inside, other=0)
    term = tl.load(shift + sample * shift_0 + channel * shift_2, mask=inside, other=0)
    x = _modulated(read, inside, factor, term, eps, CHANNELS)
    tl.store(
        out + sample * out_0 + token * out_1 + channel, x.to(read.dtype), mask=inside
    )


@triton.jit
def _add_and_normalize(  # type: ignore[no-untyped-def]
    residual,
    rows,
    gate,
    scale,
    shift,
    total,
    out,
    residual_0,
    residual_1,
    rows_0,
    rows_1,
    out_0,
    out_1,
    gate_0,
    gate_2,
    scale_0,
    scale_2,
    shift_0,
    shift_2,
    eps,
    GATED: tl.constexpr,
    ROUNDED: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row; both results have the same strides. A sum that is not rounded is not written."""
    token, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    inside = channel < CHANNELS
    place = residual + sample * residual_0 + token * residual_1
    kept = tl.load(place + channel, mask=inside, other=0.0)
    place = rows + sample * rows_0 + token * rows_1
    added = tl.load(place + channel, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        place = gate + sample * gate_0 + channel * gate_2
        added *= tl.load(place, mask=inside, other=0.0).to(tl.float32)
    row = kept.to(tl.float32) + added
    place = sample * out_0 + token * out_1 + channel
    if ROUNDED:
        rounded = row.to(kept.dtype)
        tl.store(total + place, rounded, mask=inside)
        row = rounded.to(tl.float32)
    factor = tl.load(scale + sample * scale_0 + channel * scale_2, mask=inside, other=0)
    term = tl.load(shift + sample * shift_0 + channel * shift_2, mask=inside, other=0)
    x = _modulated(row, inside, factor, term, eps, CHANNELS)
    tl.store(out + place, x.to(kept.dtype), mask=inside)


@triton.jit
def _modulated(row, inside, factor, term, eps, CHANNELS):  # type: ignore[no-untyped-def]
    """A row, zeros outside its channels, normed, scaled and shifted, in fp32."""
    x = row.to(tl.float32)
    x = tl.where(inside, x - tl.sum(x, 0) / CHANNELS, 0.0)
    x *= tl.rsqrt(tl.sum(x * x, 0) / CHANNELS + eps)
    return x * (1 + factor.to(tl.float32)) + term.to(tl.float32)
