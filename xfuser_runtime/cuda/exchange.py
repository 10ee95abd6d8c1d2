"""One exchange of heads and rows through memory that ranks share, and the attention inside it.

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

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xfuser_runtime.attention.backends import select_backend
from xfuser_runtime.attention.kernels import KernelCall
from xfuser_runtime.cuda.peer_memory import Beside, Workspace, allocate, peers_of
from xfuser_runtime.cuda.places import copy, heads_of_part, pack, rows_of_part, span
from xfuser_runtime.cuda.ways import Mover, Way, head_parts
from xfuser_runtime.distributed.layout import Range
from xfuser_runtime.distributed.parallel_state import get_ulysses_group
from xfuser_runtime.distributed.runtime_state import get_runtime_state

#: Query, key and value as they leave, by part of the heads and peer.
Staged = dict[tuple[int, int], list[torch.Tensor]]


@dataclass(frozen=True)
class Exchange:
    """One call.

    Args:
        sources: query, key and value, (B, S_local, H, D).
        query_lengths, key_lengths: rows of each rank.
        is_causal: row i takes keys 0 to i.
        scale: factor of the scores, None for D ** -0.5.
        before: where rows of all ranks come, after: where heads of all ranks come.
    """

    sources: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    query_lengths: list[int]
    key_lengths: list[int]
    is_causal: bool
    scale: float | None
    before: Workspace
    after: Workspace

    @classmethod
    def of(
        cls,
        sources: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        query_lengths: list[int],
        key_lengths: list[int],
        is_causal: bool,
        scale: float | None,
    ) -> Exchange:
        """A call in the session's workspaces of its size."""
        query = sources[0]
        batch, _, heads, channels = query.shape
        numel = batch * channels * heads // get_ulysses_group().world_size
        rows = sum(query_lengths) + 2 * sum(key_lengths)
        before = _workspace("rows", rows * numel, query)
        most = max(query_lengths) * heads * batch * channels
        after = _workspace("heads", most, query)
        return cls(sources, query_lengths, key_lengths, is_causal, scale, before, after)

    def stage(self, way: Way) -> Staged:
        """Put this rank's own rows to where it reads them, and pack what leaves if it is to be."""
        parts, staged = self._parts(way), {}
        for index in range(len(parts)):
            for peer in peers_of(get_ulysses_group()):
                staged[index, peer] = self._outgoing(way, parts, index, peer)
            self._keep_rows(parts, index)
        return staged

    def run(
        self,
        way: Way,
        result: torch.Tensor | None = None,
        staged: Staged | None = None,
    ) -> torch.Tensor:
        """Attention of the local queries, the heads travelling by `way`.

        Args:
            way: how.
            result: tensor for the output, None for a new one.
            staged: what `stage` made, None to pack each part when its turn comes.
        """
        query, group = self.sources[0], get_ulysses_group()
        rank, parts = group.rank_in_group, self._parts(way)
        calls = [self._attention(parts, index) for index in range(len(parts))]
        # Before anything travels: what times kernels waits for all that runs.
        backends = [select_backend(call) for call in calls]
        beside = Beside(query.device, "transfers")
        arrived = []
        beside.follow()
        for index in range(len(parts)):
            with beside.running():
                for peer in peers_of(group):
                    if staged is not None:
                        rows = staged[index, peer]
                    else:
                        rows = self._outgoing(way, parts, index, peer)
                    self._send_rows(rows, parts, index, peer, way.mover)
                if index and staged is None:
                    self._keep_rows(parts, index)
                self.before.handle.barrier(channel=0)
                arrived.append(beside.mark())
        if staged is None:
            self._keep_rows(parts, 0)
        if result is None:
            result = torch.empty_like(query, memory_format=torch.contiguous_format)
        held = []
        for index, ready in enumerate(arrived):
            beside.wait_for(ready)
            out, _ = backends[index].kernel(calls[index], False)
            # Transfers read it: its memory is given back once they are done.
            held.append(out)
            beside.follow()
            with beside.running():
                for peer in peers_of(group):
                    self._return_rows(out, parts, index, peer, way.mover)
                self.after.handle.barrier(channel=0)
                self._take_heads(result, parts, index)
            start, stop = span(self.query_lengths, rank)
            own_heads = self._heads(result, parts[index], rank)
            copy(own_heads, out[:, start:stop], Mover.KERNELS)
        beside.wait_for(beside.mark())
        return result

    def _parts(self, way: Way) -> list[Range]:
        local = self.sources[0].shape[2] // get_ulysses_group().world_size
        return head_parts(local, way.shares)

    def _attention(self, parts: Sequence[Range], index: int) -> KernelCall:
        """The attention of a part of this rank's heads, whose rows come to its workspace."""
        rank = get_ulysses_group().rank_in_group
        own = rows_of_part(self._shapes(), parts, index, self.before.flat[rank])
        return KernelCall(*own, is_causal=self.is_causal, scale=self.scale)

    def _shapes(self) -> list[tuple[int, int, int]]:
        """Samples, rows of all ranks and channels, of query, key and value."""
        batch, _, _, channels = self.sources[0].shape
        lengths = (self.query_lengths, self.key_lengths, self.key_lengths)
        return [(batch, sum(n), channels) for n in lengths]

    def _rows_for(
        self, parts: Sequence[Range], index: int, peer: int
    ) -> list[torch.Tensor]:
        """A part of the peer's heads of this rank's rows, of query, key and value."""
        first, last = (peer * parts[-1][1] + head for head in parts[index])
        return [x[:, :, first:last] for x in self.sources]

    def _outgoing(
        self, way: Way, parts: Sequence[Range], index: int, peer: int
    ) -> list[torch.Tensor]:
        """What goes to a peer, packed if the way is so."""
        rows = self._rows_for(parts, index, peer)
        return pack(rows) if way.mover is Mover.PACKED else rows

    def _send_rows(
        self,
        rows: Sequence[torch.Tensor],
        parts: Sequence[Range],
        index: int,
        peer: int,
        mover: Mover,
    ) -> None:
        """Put rows of a part of the peer's heads to where it reads them."""
        rank = get_ulysses_group().rank_in_group
        targets = rows_of_part(self._shapes(), parts, index, self.before.flat[peer])
        lengths = (self.query_lengths, self.key_lengths, self.key_lengths)
        for target, n, x in zip(targets, lengths, rows, strict=True):
            copy(target[:, slice(*span(n, rank))], x, mover)

    def _keep_rows(self, parts: Sequence[Range], index: int) -> None:
        """Put this rank's rows of a part of its own heads to where it reads them."""
        rank = get_ulysses_group().rank_in_group
        rows = self._rows_for(parts, index, rank)
        self._send_rows(rows, parts, index, rank, Mover.KERNELS)

    def _return_rows(
        self,
        out: torch.Tensor,
        parts: Sequence[Range],
        index: int,
        peer: int,
        mover: Mover,
    ) -> None:
        """Put the peer's rows of this rank's heads of a part to where it reads them."""
        batch, _, _, channels = out.shape
        start, stop = span(self.query_lengths, peer)
        shape = (batch, stop - start, channels)
        rank, flat = get_ulysses_group().rank_in_group, self.after.flat[peer]
        target = heads_of_part(shape, parts, index, rank, flat)
        copy(target, out[:, start:stop], mover)

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
            copy(self._heads(result, parts[index], peer), theirs, Mover.KERNELS)

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
