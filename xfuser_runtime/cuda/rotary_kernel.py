"""The kernel of `rotated_heads`; apart, since Triton is there on GPUs alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from xfuser_runtime.cuda.kernel import empty_joined, places
from xfuser_runtime.cuda.rotary import token_dim

#: Numbers that a program holds: more need more registers than there are.
NUMBERS = 4096
WARPS = 8


def launch(
    parts: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> torch.Tensor:
    """`rotated_heads` on a GPU."""
    dim, channels = token_dim(cos), parts[0].shape[-1]
    out = empty_joined(parts, dim)
    by = [x.reshape(-1, channels).contiguous() for x in (cos, sin)]
    width = triton.next_power_of_2(channels)
    rows = max(1, NUMBERS // width)
    for index, (heads, target, first) in enumerate(places(parts, out, dim)):
        count = heads.numel() // channels
        _rotate[(triton.cdiv(count, rows),)](
            heads,
            weights[index] if weights else heads,
            *(x[first:] for x in by),
            target,
            count,
            *heads.shape[1:3],
            *heads.stride()[:3],
            *target.stride()[:3],
            eps,
            TOKENS_FIRST=dim == 1,
            NORM=bool(weights),
            CHANNELS=channels,
            WIDTH=width,
            ROWS=rows,
            num_warps=WARPS,
        )
    return out


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    heads,
    weight,
    cos,
    sin,
    out,
    count,
    size_1,
    size_2,
    heads_0,
    heads_1,
    heads_2,
    out_0,
    out_1,
    out_2,
    eps,
    TOKENS_FIRST: tl.constexpr,
    NORM: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rows of one head and token each; offsets in 64 bits, since videos pass 2 ** 31 numbers."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    second = row % size_2
    first = row // size_2 % size_1
    sample = row // size_2 // size_1
    channel = tl.arange(0, WIDTH)[None, :]
    inside = (row < count)[:, None] & (channel < CHANNELS)
    place = sample * heads_0 + first * heads_1 + second * heads_2
    read = tl.load(heads + place[:, None] + channel, mask=inside, other=0.0)
    x = read.to(tl.float32)
    if NORM:
        mean = tl.sum(x * x, 1) / CHANNELS
        scale = tl.load(weight + channel, mask=channel < CHANNELS, other=0.0)
        x = x * tl.rsqrt(mean + eps)[:, None] * scale.to(tl.float32)
        # Rounded as the norm's result is.
        x = x.to(read.dtype).to(tl.float32)
    even, odd = tl.split(x.reshape(ROWS, WIDTH // 2, 2))
    turned = tl.join(-odd, even).reshape(ROWS, WIDTH)
    token = first if TOKENS_FIRST else second
    angle = token[:, None] * CHANNELS + channel
    x = x * tl.load(cos + angle, mask=inside, other=0.0)
    x += turned * tl.load(sin + angle, mask=inside, other=0.0)
    place = sample * out_0 + first * out_1 + second * out_2
    tl.store(out + place[:, None] + channel, x.to(read.dtype), mask=inside)
