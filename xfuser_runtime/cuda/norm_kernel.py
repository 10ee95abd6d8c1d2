"""The kernel of `modulated_norm`; apart, since Triton is there on GPUs alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from xfuser_runtime.cuda.kernel import empty_joined, places

#: Channels that a warp holds.
WARP_CHANNELS = 512
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
            num_warps=min(MAX_WARPS, max(1, width // WARP_CHANNELS)),
        )
    return out


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
    x = read.to(tl.float32)
    x = tl.where(inside, x - tl.sum(x, 0) / CHANNELS, 0.0)
    x *= tl.rsqrt(tl.sum(x * x, 0) / CHANNELS + eps)
    factor = tl.load(scale + sample * scale_0 + channel * scale_2, mask=inside, other=0)
    term = tl.load(shift + sample * shift_0 + channel * shift_2, mask=inside, other=0)
    x = x * (1 + factor.to(tl.float32)) + term.to(tl.float32)
    tl.store(
        out + sample * out_0 + token * out_1 + channel, x.to(read.dtype), mask=inside
    )
