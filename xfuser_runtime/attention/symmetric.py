"""Ulysses between GPUs that can write to each other's memory: no message, no extra copy.

Each rank writes the heads of the others straight to where they are read: one copy takes the
place of packing, sending and unpacking. Then all meet at a barrier on the device.

The heads of a rank are cut into parts. Transfers run on a stream of their own, so that one part
travels while another is computed:

    transfers   write 0 | barrier | write 1 | barrier |   back 0 | barrier | back 1 | barrier
    kernels     own rows          | attention 0       | attention 1        | ................

Two workspaces take turns, one before and one after attention: whoever has passed the last
barrier of one knows that the others have read the other.

Shapes: B batch, S_r rows of rank r, H heads, h = H / U those of one rank, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from xfuser_runtime.attention.peer_memory import (
    Beside,
    Workspace,
    allocate,
    peers_of,
)
from xfuser_runtime.attention.places import (
    copy,
    heads_of_part,
    pack,
    rows_of_part,
    span,
)
from xfuser_runtime.attention.ways import WAYS, Way, different, fastest, head_parts
from xfuser_runtime.distributed.layout import Range
from xfuser_runtime.distributed.parallel_state import get_ulysses_group
from xfuser_runtime.distributed.runtime_state import get_runtime_state

#: How heads travel; None to time the ways on CUDA.
WAY: Way | None = None


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Attention of the local queries over the keys of all ranks of the Ulysses group.

    Args:
        query: (B, S_local, H, D), H a multiple of the degree.
        key, value: (B, K_local, H, D).
        query_lengths, key_lengths: rows of each rank.
        is_causal: row i takes keys 0 to i.
        scale: factor of the scores, None for D ** -0.5.

    Returns:
        (B, S_local, H, D).
    """
    return torch.ops.xfuser_runtime.symmetric_ulysses(
        query, key, value, list(query_lengths), list(key_lengths), is_causal, scale
    )


@torch.library.custom_op("xfuser_runtime::symmetric_ulysses", mutates_args=())
def _symmetric_ulysses(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_lengths: list[int],
    key_lengths: list[int],
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    group = get_ulysses_group()
    batch, _, heads, channels = query.shape
    numel = batch * channels * heads // group.world_size
    rows = sum(query_lengths) + 2 * sum(key_lengths)
    before = _workspace("rows", rows * numel, query)
    after = _workspace("heads", max(query_lengths) * heads * batch * channels, query)
    call = _Call((query, key, value), query_lengths, key_lengths, before, after)

    def run(way: Way) -> torch.Tensor:
        return call.run(way, is_causal=is_causal, scale=scale)

    return run(_chosen_way(run, query, query_lengths, key_lengths, is_causal))


@_symmetric_ulysses.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_lengths: list[int],
    key_lengths: list[int],
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    return query.new_empty(query.shape)


@dataclass(frozen=True)
class _Call:
    """One exchange and the attention inside it.

    Args:
        sources: query, key and value, (B, S_local, H, D).
        query_lengths, key_lengths: rows of each rank.
        before: where rows of all ranks come, after: where heads of all ranks come.
    """

    sources: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    query_lengths: list[int]
    key_lengths: list[int]
    before: Workspace
    after: Workspace

    def run(self, way: Way, *, is_causal: bool, scale: float | None) -> torch.Tensor:
        """Attention of the local queries, the heads travelling by `way`."""
        query, group = self.sources[0], get_ulysses_group()
        rank, degree = group.rank_in_group, group.world_size
        parts = head_parts(query.shape[2] // degree, way.shares)
        beside = Beside(query.device)
        arrived = []
        beside.follow()
        for index in range(len(parts)):
            with beside.running():
                for peer in peers_of(group):
                    self._send_heads(parts, index, peer, rank, packed=way.packed)
                if index:
                    self._send_heads(parts, index, rank, rank)
                self.before.handle.barrier(channel=0)
                arrived.append(beside.mark())
        self._send_heads(parts, 0, rank, rank)
        result = torch.empty_like(query, memory_format=torch.contiguous_format)
        held = []
        for index, ready in enumerate(arrived):
            beside.wait_for(ready)
            own = rows_of_part(self._shapes(), parts, index, self.before.flat[rank])
            out = F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in own), is_causal=is_causal, scale=scale
            ).transpose(1, 2)
            # Transfers read it: its memory is given back once they are done.
            held.append(out)
            beside.follow()
            with beside.running():
                for peer in peers_of(group):
                    self._return_rows(out, parts, index, peer, rank, way.packed)
                self.after.handle.barrier(channel=0)
                self._take_heads(result, parts, index)
            start, stop = span(self.query_lengths, rank)
            copy(self._heads(result, parts[index], rank), out[:, start:stop])
        beside.wait_for(beside.mark())
        return result

    def _shapes(self) -> list[tuple[int, int, int]]:
        """Samples, rows of all ranks and channels, of query, key and value."""
        batch, _, _, channels = self.sources[0].shape
        lengths = (self.query_lengths, self.key_lengths, self.key_lengths)
        return [(batch, sum(n), channels) for n in lengths]

    def _send_heads(
        self,
        parts: Sequence[Range],
        index: int,
        peer: int,
        rank: int,
        *,
        packed: bool = False,
    ) -> None:
        """Put the peer's heads of a part of this rank's rows to where it reads them."""
        targets = rows_of_part(self._shapes(), parts, index, self.before.flat[peer])
        local = parts[-1][1]
        first, last = (peer * local + head for head in parts[index])
        lengths = (self.query_lengths, self.key_lengths, self.key_lengths)
        places = [
            x[:, slice(*span(n, rank))] for x, n in zip(targets, lengths, strict=True)
        ]
        rows = [x[:, :, first:last] for x in self.sources]
        for place, x in zip(places, pack(rows) if packed else rows, strict=True):
            copy(place, x, by_sample=packed)

    def _return_rows(
        self,
        out: torch.Tensor,
        parts: Sequence[Range],
        index: int,
        peer: int,
        rank: int,
        packed: bool,
    ) -> None:
        """Put the peer's rows of this rank's heads of a part to where it reads them."""
        batch, _, _, channels = out.shape
        start, stop = span(self.query_lengths, peer)
        target = heads_of_part(
            (batch, stop - start, channels), parts, index, rank, self.after.flat[peer]
        )
        copy(target, out[:, start:stop], by_sample=packed)

    def _take_heads(
        self, result: torch.Tensor, parts: Sequence[Range], index: int
    ) -> None:
        """Put the others' heads of a part, which have come, into the result."""
        group = get_ulysses_group()
        batch, rows, _, channels = result.shape
        flat = self.after.flat[group.rank_in_group]
        for peer in peers_of(group):
            shape = (batch, rows, channels)
            theirs = heads_of_part(shape, parts, index, peer, flat)
            copy(self._heads(result, parts[index], peer), theirs)

    def _heads(self, result: torch.Tensor, part: Range, rank: int) -> torch.Tensor:
        """The heads of a part of a rank's."""
        local = result.shape[2] // get_ulysses_group().world_size
        return result[:, :, rank * local + part[0] : rank * local + part[1]]


def _workspace(use: str, numel: int, like: torch.Tensor) -> Workspace:
    """The session's workspace; the first call of a size makes it, on all ranks alike."""
    held = get_runtime_state().workspaces
    key = (use, numel, like.dtype)
    if key not in held:
        held[key] = allocate(numel, like.dtype, get_ulysses_group())
    return held[key]


def _chosen_way(
    run: Callable[[Way], torch.Tensor],
    query: torch.Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    is_causal: bool,
) -> Way:
    """The way that this session takes for calls of a shape; the first call times them all.

    What it depends on is the same on all ranks, so that all choose, and choose alike.
    """
    if WAY is not None or not query.is_cuda:
        return WAY or Way()
    held, group = get_runtime_state().workspaces, get_ulysses_group()
    batch, _, heads, channels = query.shape
    shape = (batch, sum(query_lengths), sum(key_lengths), heads, channels)
    key = ("way", *shape, query.dtype, is_causal)
    if key not in held:
        if torch.cuda.is_current_stream_capturing():
            return Way()
        ways = different(WAYS, heads // group.world_size)
        held[key] = fastest(run, ways, group)
    way: Way = held[key]
    return way
