"""Ulysses: every rank trades its rows of all heads for all rows of its heads.

One all-to-all carries query, key, value and the key mask; one brings the output back. Both
are functional collectives with sizes known from integers alone, so torch.compile traces
through them. Lengths and heads may be uneven, ranks may be left without rows or heads.

Shapes: B batch, S_r query rows of rank r, K_r its key rows, H query heads, G key heads, D head
dimension; h, g the heads of one rank after the exchange. U is the degree. Not differentiable.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from xfuser_runtime.attention.keys import KeyBlock
from xfuser_runtime.distributed.collectives import all_to_all_flat
from xfuser_runtime.distributed.layout import Range
from xfuser_runtime.distributed.parallel_state import Group


@dataclass(frozen=True)
class HeadSplit:
    """Which heads each rank works on.

    Args:
        query: the query heads of each rank, balanced.
        key: the key heads that these read; where several query heads share a key head, a
            key head may go to two ranks.
        group: query heads per key head.
    """

    query: tuple[Range, ...]
    key: tuple[Range, ...]
    group: int

    @property
    def is_even(self) -> bool:
        """All ranks have the same number of heads and no key head goes to two."""
        sizes = {_size(r) for r in self.query}
        starts = all(a[1] == b[0] for a, b in zip(self.key, self.key[1:], strict=False))
        return len(sizes) == 1 and len({_size(r) for r in self.key}) == 1 and starts

    def key_head_of_query_heads(self, rank: int) -> list[int] | None:
        """Local key head of each local query head; None where equal groups say it."""
        (start, stop), (first, last) = self.query[rank], self.key[rank]
        if last - first <= 1 or (start % self.group == 0 and stop % self.group == 0):
            return None
        return [head // self.group - first for head in range(start, stop)]


def split_heads(num_query_heads: int, num_key_heads: int, degree: int) -> HeadSplit:
    """Balanced query heads and the key heads that they read."""
    group = num_query_heads // num_key_heads
    base, extra = divmod(num_query_heads, degree)
    query: list[Range] = []
    for rank in range(degree):
        start = rank * base + min(rank, extra)
        query.append((start, start + base + (rank < extra)))
    key = tuple(
        (a // group, -(-b // group)) if b > a else (a // group, a // group)
        for a, b in query
    )
    return HeadSplit(tuple(query), key, group)


def rows_to_heads(
    query: torch.Tensor,
    block: KeyBlock,
    *,
    heads: HeadSplit,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    group: Group,
) -> tuple[torch.Tensor, KeyBlock]:
    """Trade local rows of all heads for all rows of this rank's heads.

    Args:
        query: (B, S_local, H, D).
        block: keys (B, K_local, G, D), values, key mask or None.
        heads: who gets which heads.
        query_lengths: query rows of each rank of the group.
        key_lengths: key rows of each rank of the group.
        group: the Ulysses group.

    Returns:
        The query (B, sum S, h, D) and the keys (B, sum K, g, D), rows in rank order; where
        a rank's query heads do not fill whole groups, its key heads are repeated.
    """
    dtype = query.dtype
    sources = [query, block.key, block.value]
    if block.mask is not None:
        # As numbers of the query's type the mask rides along: 0 and 1 if bool, else as is.
        sources.append(block.mask.to(dtype).permute(0, 3, 1, 2))  # (B, K, H, 1)
    mask_heads = None if block.mask is None else block.mask.shape[1]
    ranges = [_ranges_of(i, heads, mask_heads) for i in range(len(sources))]
    send = _pack_heads(sources, ranges, even=heads.is_even)
    sent = [
        sum(
            _numel(x, x.shape[1], r[peer]) for x, r in zip(sources, ranges, strict=True)
        )
        for peer in range(group.world_size)
    ]
    mine = [r[group.rank_in_group] for r in ranges]
    rows = [query_lengths] + [key_lengths] * (len(sources) - 1)
    sizes = [
        [_numel(x, n[peer], r) for x, n, r in zip(sources, rows, mine, strict=True)]
        for peer in range(group.world_size)
    ]
    received = all_to_all_flat(send, [sum(s) for s in sizes], sent, group)
    pieces = iter(received.split([size for peer in sizes for size in peer]))
    parts: list[list[torch.Tensor]] = [[] for _ in sources]
    for peer in range(group.world_size):
        for i, x in enumerate(sources):
            shape = (x.shape[0], rows[i][peer], _size(mine[i]), x.shape[3])
            parts[i].append(next(pieces).view(shape))
    joined = [torch.cat(p, dim=1) for p in parts]
    mask = None
    if block.mask is not None:
        mask = joined[3].permute(0, 2, 3, 1).to(block.mask.dtype)
    picked = heads.key_head_of_query_heads(group.rank_in_group)
    key, value = joined[1], joined[2]
    if picked is not None:
        index = torch.tensor(picked, device=key.device)
        key, value = key.index_select(2, index), value.index_select(2, index)
    return joined[0], KeyBlock(key, value, mask)


def heads_to_rows(
    out: torch.Tensor,
    *,
    heads: HeadSplit,
    query_lengths: Sequence[int],
    group: Group,
) -> torch.Tensor:
    """Trade all rows of this rank's heads, (B, sum S, h, D), for (B, S_local, H, D)."""
    batch, _, local_heads, channels = out.shape
    rows = query_lengths[group.rank_in_group]
    # With one sample the output lies in memory as it is sent.
    send = (
        out.reshape(-1) if batch == 1 else _pack(out.split(list(query_lengths), dim=1))
    )
    sent = [batch * length * local_heads * channels for length in query_lengths]
    sizes = [batch * rows * _size(r) * channels for r in heads.query]
    received = all_to_all_flat(send, sizes, sent, group)
    pieces = [
        piece.view(batch, rows, _size(r), channels)
        for piece, r in zip(received.split(sizes), heads.query, strict=True)
    ]
    return torch.cat(pieces, dim=2)


def gather_mask_rows(
    mask: torch.Tensor,
    *,
    heads: HeadSplit,
    query_lengths: Sequence[int],
    group: Group,
) -> torch.Tensor:
    """All query rows of this rank's heads of a mask (B or 1, H or 1, S_local, K).

    As many rows are sent to every rank as it has, so this is an all-to-all, too.
    """
    split = _ranges_of(3, heads, mask.shape[1])
    mine = split[group.rank_in_group]
    wire = mask.to(torch.uint8) if mask.dtype == torch.bool else mask
    send = _pack(wire[:, start:stop] for start, stop in split)
    per_head = [mask.shape[0] * n * mask.shape[3] for n in query_lengths]
    sent = [per_head[group.rank_in_group] * _size(r) for r in split]
    sizes = [n * _size(mine) for n in per_head]
    received = all_to_all_flat(send, sizes, sent, group).split(sizes)
    shape = (mask.shape[0], _size(mine), -1, mask.shape[3])
    pieces = [
        piece.view(*shape[:2], n, shape[3])
        for piece, n in zip(received, query_lengths, strict=True)
    ]
    return torch.cat(pieces, dim=2).to(mask.dtype)


def _ranges_of(
    source: int, heads: HeadSplit, mask_heads: int | None
) -> tuple[Range, ...]:
    """Heads that go to each rank, of query (0), key (1), value (2) or mask (3)."""
    if source == 0:
        return heads.query
    if source < 3:
        return heads.key
    return heads.query if mask_heads != 1 else ((0, 1),) * len(heads.query)


def _pack_heads(
    sources: Sequence[torch.Tensor],
    ranges: Sequence[Sequence[Range]],
    *,
    even: bool,
) -> torch.Tensor:
    """One flat buffer, rank by rank: that rank's heads of every source. One copy of each."""
    degree = len(ranges[0])
    if not even:
        return _pack(
            x[:, :, r[peer][0] : r[peer][1]]
            for peer in range(degree)
            for x, r in zip(sources, ranges, strict=True)
        )
    sizes = [_numel(x, x.shape[1], r[0]) for x, r in zip(sources, ranges, strict=True)]
    buffer = sources[0].new_empty(degree, sum(sizes))
    for part, x, r in zip(buffer.split(sizes, dim=1), sources, ranges, strict=True):
        local = _size(r[0])
        if r[0] == r[-1]:  # one mask for all heads goes to every rank
            spread = x.unsqueeze(0).expand(degree, *x.shape)
        else:
            spread = x.unflatten(2, (degree, local)).permute(2, 0, 1, 3, 4)
        part.view(spread.shape).copy_(spread)
    return buffer.view(-1)


def _pack(pieces: Iterable[torch.Tensor]) -> torch.Tensor:
    """The pieces one after another in one flat buffer, each copied once."""
    held = list(pieces)
    buffer = held[0].new_empty(sum(piece.numel() for piece in held))
    for part, piece in zip(
        buffer.split([piece.numel() for piece in held]), held, strict=True
    ):
        part.view(piece.shape).copy_(piece)
    return buffer


def _numel(x: torch.Tensor, rows: int, heads: Range) -> int:
    return x.shape[0] * rows * _size(heads) * x.shape[3]


def _size(heads: Range) -> int:
    return heads[1] - heads[0]
