"""The exchange through shared memory: its copies played in turn, and on ranks that share memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.ranks import run_ranks
from tests.runtime.attention.harness import relative_error
from xfuser_runtime.attention import symmetric
from xfuser_runtime.attention.symmetric import (
    Workspace,
    carve,
    head_parts,
    is_usable,
    write_heads,
    write_rows,
)
from xfuser_runtime.config import EngineConfig, ParallelConfig
from xfuser_runtime.distributed.launch import prepare_environment
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


def on_ranks(
    lengths: list[int],
    qkv: list[torch.Tensor],
    *,
    calls: int = 2,
    parts: int = 2,
    skip: int | None = None,
) -> list[torch.Tensor]:
    """Attention of forked ranks that share memory, once for each of `calls` factors.

    Args:
        lengths: rows of each rank.
        qkv: whole query, key and value.
        calls: calls one after another through the same workspaces.
        parts: of the heads.
        skip: a sabotage: the last part of the heads is computed before it arrives.
    """
    degree, numel = len(lengths), 3 * qkv[0].numel()
    nothing = torch.full((numel,), float("nan"), dtype=qkv[0].dtype)
    # One for each rank and workspace, before the ranks are forked.
    pool = [nothing.clone().share_memory_() for _ in range(2 * degree)]

    def allocate(count: int, dtype: torch.dtype, group: Group) -> Workspace:
        first = len(used) * degree
        used.append(count)
        flat = tuple(pool[first + rank][:count] for rank in range(degree))
        barrier = SimpleNamespace(barrier=lambda channel: dist.barrier())
        return Workspace(flat, barrier)

    used: list[int] = []

    def rank_main(rank: int) -> list[torch.Tensor]:
        degrees = ParallelConfig(ulysses_degree=degree)
        prepare_environment(EngineConfig(degrees, world_size=degree))
        symmetric.allocate = allocate  # type: ignore[assignment]
        symmetric.NUM_PARTS = parts
        if skip is not None:
            cut = symmetric.head_parts
            symmetric.head_parts = lambda *a: cut(*a)[:skip]  # type: ignore[assignment]
        start = sum(lengths[:rank])
        own = [x[:, start : start + lengths[rank]] for x in qkv]
        return [
            symmetric.attention(
                *(x * factor for x in own),
                query_lengths=lengths,
                key_lengths=lengths,
                is_causal=False,
                scale=None,
            )
            for factor in range(1, calls + 1)
        ]

    found = run_ranks(rank_main, degree)
    return [torch.cat(rows, dim=1) for rows in zip(*found, strict=True)]


@pytest.mark.parametrize(
    ("lengths", "parts"), [([5, 4], 2), ([4, 4], 1), ([3, 3], 3), ([4, 3, 2], 2)]
)
@pytest.mark.parametrize("channels", [8, 5])
def test_ranks_that_share_memory(lengths: list[int], parts: int, channels: int) -> None:
    """Two calls through the same workspaces; channels of 5 fill no 16 bytes."""
    torch.manual_seed(0)
    qkv = [torch.randn(2, sum(lengths), 6, channels).double() for _ in range(3)]
    for factor, found in enumerate(on_ranks(lengths, qkv, parts=parts), 1):
        q, k, v = (x.transpose(1, 2) * factor for x in qkv)
        expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        assert relative_error(found, expected) <= 1e-12


def test_a_part_that_is_left_out_is_seen() -> None:
    torch.manual_seed(0)
    qkv = [torch.randn(1, 8, 4, 8).double() for _ in range(3)]
    (found,) = on_ranks([4, 4], qkv, calls=1, skip=1)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv))
    assert not relative_error(found.nan_to_num(), expected.transpose(1, 2)) < 1e-1


def test_parts_hold_all_heads() -> None:
    assert head_parts(5, 2) == [(0, 2), (2, 5)]
    assert head_parts(1, 2) == [(0, 1)]
    assert head_parts(4, 1) == [(0, 4)]
