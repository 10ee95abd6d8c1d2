"""The exchange through shared memory: the copies of all ranks, played one after another."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.runtime.attention.harness import relative_error
from xfuser_runtime.attention.symmetric import (
    carve,
    is_usable,
    write_heads,
    write_rows,
)
from xfuser_runtime.distributed.parallel_state import Group


def simulated(
    lengths: list[int], qkv: list[torch.Tensor], *, swap: bool = False
) -> torch.Tensor:
    """Attention by the copies of every rank; with `swap` the ranks mix up their heads."""
    degree, (batch, rows, heads, channels) = len(lengths), qkv[0].shape
    local, starts = heads // degree, [sum(lengths[:r]) for r in range(degree)]
    shapes = [(batch, rows, local, channels)] * 3
    numel = batch * rows * heads * channels
    before = [torch.full((3 * numel,), float("nan")).double() for _ in lengths]
    after = [torch.full((numel,), float("nan")).double() for _ in lengths]
    for rank, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        for peer in range(degree):
            for x, target in zip(qkv, carve(before[peer], shapes), strict=True):
                write_heads(x[:, start : start + length], target, peer, rank, lengths)
    for rank in range(degree):
        own = (x.transpose(1, 2) for x in carve(before[rank], shapes))
        out = F.scaled_dot_product_attention(*own).transpose(1, 2)
        place = degree - 1 - rank if swap else rank
        for peer, length in enumerate(lengths):
            target = carve(after[peer], [(batch, length, heads, channels)])[0]
            write_rows(out, target, peer, place, lengths)
    found = [
        carve(flat, [(batch, length, heads, channels)])[0]
        for flat, length in zip(after, lengths, strict=True)
    ]
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("lengths", [[5, 5], [5, 4], [4, 3, 3], [6, 0]])
def test_copies_make_attention(lengths: list[int]) -> None:
    torch.manual_seed(0)
    qkv = [torch.randn(2, sum(lengths), 6, 8).double() for _ in range(3)]
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv))
    expected = expected.transpose(1, 2)
    assert relative_error(simulated(lengths, qkv), expected) <= 1e-12
    assert relative_error(simulated(lengths, qkv, swap=True), expected) > 1e-1


def test_one_rank_or_no_gpu_does_without() -> None:
    assert not is_usable(Group())
    if not torch.cuda.is_available():
        assert not is_usable(Group((0, 1)))
