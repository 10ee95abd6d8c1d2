"""The exchange through shared memory: its copies played in turn, and on ranks that share memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.ranks import run_ranks
from tests.runtime.attention.harness import relative_error
from tests.runtime.cuda.shared_memory import SharedMemory
from xfuser_runtime.cuda import exchange, symmetric, ways
from xfuser_runtime.cuda.peer_memory import is_usable
from xfuser_runtime.cuda.ways import WAYS, Mover, Way, different, head_parts
from xfuser_runtime.distributed.parallel_state import Group


def test_one_rank_or_no_gpu_does_without() -> None:
    assert not is_usable(Group())
    if not torch.cuda.is_available():
        assert not is_usable(Group((0, 1)))


def on_ranks(
    lengths: list[int],
    qkv: list[torch.Tensor],
    *,
    calls: int = 2,
    way: Way | None = None,
    skip: int | None = None,
    swap: bool = False,
) -> list[torch.Tensor]:
    """Attention of forked ranks that share memory, once for each of `calls` factors.

    Args:
        lengths: rows of each rank.
        qkv: whole query, key and value.
        calls: calls one after another through the same workspaces.
        way: how the heads travel, None for the ordinary one.
        skip: a sabotage: the last part of the heads is left out.
        swap: a sabotage: the ranks mix up their heads.
    """
    degree = len(lengths)
    memory = SharedMemory(degree, 3 * qkv[0].numel(), qkv[0].dtype)

    def rank_main(rank: int) -> list[torch.Tensor]:
        memory.enter()
        symmetric.WAY = way
        if skip is not None:
            cut = exchange.head_parts
            exchange.head_parts = lambda *a: cut(*a)[:skip]  # type: ignore[assignment]
        if swap:
            heads = exchange.Exchange._heads
            exchange.Exchange._heads = (  # type: ignore[method-assign]
                lambda call, x, part, source: heads(call, x, part, degree - 1 - source)
            )
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
    ("lengths", "shares"),
    [
        ([5, 4], (1, 1)),
        ([4, 4], (1,)),
        ([3, 3], (1, 1, 1)),
        ([4, 3, 2], (1, 1)),
        ([6, 0], (1, 2)),
        ([4, 3], (1, 2, 1)),
    ],
)
@pytest.mark.parametrize("mover", list(Mover))
@pytest.mark.parametrize("channels", [8, 5])
def test_ranks_that_share_memory(
    lengths: list[int], shares: tuple[int, ...], mover: Mover, channels: int
) -> None:
    """Two calls through the same workspaces; channels of 5 fill no 16 bytes in fp32."""
    torch.manual_seed(0)
    dtype = torch.float32 if channels == 5 else torch.float64
    qkv = [torch.randn(2, sum(lengths), 6, channels, dtype=dtype) for _ in range(3)]
    way = Way(shares, mover)
    for factor, found in enumerate(on_ranks(lengths, qkv, way=way), 1):
        q, k, v = (x.transpose(1, 2) * factor for x in qkv)
        expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        assert relative_error(found, expected) <= (1e-12 if channels == 8 else 1e-6)


@pytest.mark.parametrize("fault", [{"skip": 1}, {"swap": True}])
def test_a_fault_is_seen(fault: dict[str, int]) -> None:
    torch.manual_seed(0)
    qkv = [torch.randn(1, 8, 4, 8).double() for _ in range(3)]
    (found,) = on_ranks([4, 4], qkv, calls=1, **fault)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv))
    assert not relative_error(found.nan_to_num(), expected.transpose(1, 2)) < 1e-1


def test_parts_hold_all_heads() -> None:
    assert head_parts(5, (1, 1)) == [(0, 2), (2, 5)]
    assert head_parts(1, (1, 1)) == [(0, 1)]
    assert head_parts(4, (1,)) == [(0, 4)]
    assert head_parts(12, (1, 2, 1)) == [(0, 3), (3, 9), (9, 12)]
    assert head_parts(2, (1,) * 6) == [(0, 1), (1, 2)]


def test_ways_that_cut_alike_are_one() -> None:
    assert [way.shares for way in different(WAYS, 1)] == [(1,)] * len(Mover)
    names = [way.name for way in different(WAYS, 2)]
    assert names[:3] == ["1", "1 packed", "1 engines"] and len(names) == len(
        set(names)
    ) < len(WAYS)
    assert different(WAYS, 12) == list(WAYS)


def test_the_slowest_rank_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A way that this rank finds fastest, but that another cannot take, is not chosen."""
    own = {"1": 3.0, "1 packed": 1.0, "1:1": 2.0}
    others = torch.tensor([3.0, float("inf"), 1.0])
    monkeypatch.setattr(ways, "_seconds", lambda run, way, *_: own[way.name])
    monkeypatch.setattr(ways, "all_reduce_max", lambda x, group: x.maximum(others))
    monkeypatch.setattr(ways, "_DEVICE", "cpu")
    chosen = ways.fastest(
        lambda way: None, [Way((1,)), Way((1,), Mover.PACKED), Way()], Group()
    )
    assert chosen == Way()
