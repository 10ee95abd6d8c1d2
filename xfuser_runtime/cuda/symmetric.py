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

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from xfuser_runtime.cuda.peer_memory import (
    Beside,
    Workspace,
    allocate,
    peers_of,
)
from xfuser_runtime.cuda.places import (
    copy,
    heads_of_part,
    pack,
    rows_of_part,
    span,
)
from xfuser_runtime.cuda.ways import (
    WAYS,
    Mover,
    Way,
    different,
    fastest,
    head_parts,
)
from xfuser_runtime.distributed.layout import Range
from xfuser_runtime.distributed.parallel_state import get_ulysses_group
from xfuser_runtime.distributed.runtime_state import get_runtime_state

#: How heads travel; None to time the ways on CUDA.
WAY: Way | None = None

#: Query, key and value as they leave, by part of the heads and peer.
_Staged = dict[tuple[int, int], list[torch.Tensor]]


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
    sources = (query, key, value)
    call = _new_call(sources, query_lengths, key_lengths, is_causal, scale)
    return call.run(_chosen_way(call, call.run))


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


@torch.library.custom_op("xfuser_runtime::symmetric_ulysses_begin", mutates_args=())
def _begin(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_lengths: list[int],
    key_lengths: list[int],
    is_causal: bool,
    scale: float | None,
    products: list[int],
) -> torch.Tensor:
    """`symmetric_ulysses` beside the kernels that follow; `symmetric_ulysses_end` waits for it.

    Until then the output is not filled and the inputs must stay as they are. `products` are the
    rows, inner extent and columns of each matrix product that follows.
    """
    sources = (query, key, value)
    call = _new_call(sources, query_lengths, key_lengths, is_causal, scale)
    run = functools.partial(_beside_products, call, products)
    way = _chosen_way(call, run, products)
    get_runtime_state().workspaces["begun"] = _addresses(sources)
    return _begun(call, way)


@_begin.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_lengths: list[int],
    key_lengths: list[int],
    is_causal: bool,
    scale: float | None,
    products: list[int],
) -> torch.Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op(
    "xfuser_runtime::symmetric_ulysses_end", mutates_args=("result",)
)
def _end(
    result: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    """Wait for what `symmetric_ulysses_begin` began; query, key and value are its inputs."""
    begun = get_runtime_state().workspaces.pop("begun")
    if begun != _addresses((query, key, value)):
        raise RuntimeError(
            "attention beside other work read copies of its inputs, expected the inputs; "
            "run without use_torch_compile"
        )
    _finish(result)


def _begun(call: _Call, way: Way) -> torch.Tensor:
    """The output of a call that runs beside the kernels that follow."""
    query = call.sources[0]
    result = torch.empty_like(query, memory_format=torch.contiguous_format)
    beside, staged = Beside(query.device, "attention"), None
    beside.follow()
    if way.mover is not Mover.KERNELS:
        # The kernels that follow would keep the multiprocessors from those that stage; what
        # is staged travels without any.
        with beside.running():
            staged = call.stage(way)
        beside.wait_for(beside.mark())
    with beside.running():
        call.run(way, result, staged)
    return result


def _finish(result: torch.Tensor) -> None:
    beside = Beside(result.device, "attention")
    beside.wait_for(beside.mark())


def _beside_products(call: _Call, products: Sequence[int], way: Way) -> torch.Tensor:
    """The call beside matrix products of these sizes, to time a way."""
    result, like = _begun(call, way), call.sources[0]
    for rows, inner, columns in zip(*(iter(products),) * 3, strict=True):
        torch.mm(like.new_ones(rows, inner), like.new_ones(inner, columns))
    _finish(result)
    return result


def _new_call(
    sources: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    query_lengths: list[int],
    key_lengths: list[int],
    is_causal: bool,
    scale: float | None,
) -> _Call:
    query = sources[0]
    batch, _, heads, channels = query.shape
    numel = batch * channels * heads // get_ulysses_group().world_size
    rows = sum(query_lengths) + 2 * sum(key_lengths)
    before = _workspace("rows", rows * numel, query)
    after = _workspace("heads", max(query_lengths) * heads * batch * channels, query)
    return _Call(sources, query_lengths, key_lengths, is_causal, scale, before, after)


def _addresses(tensors: Iterable[torch.Tensor]) -> tuple[int, ...]:
    return tuple(x.data_ptr() for x in tensors)


@dataclass(frozen=True)
class _Call:
    """One exchange and the attention inside it.

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

    def stage(self, way: Way) -> _Staged:
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
        staged: _Staged | None = None,
    ) -> torch.Tensor:
        """Attention of the local queries, the heads travelling by `way`.

        Args:
            way: how.
            result: tensor for the output, None for a new one.
            staged: what `stage` made, None to pack each part when its turn comes.
        """
        query, group = self.sources[0], get_ulysses_group()
        rank, parts = group.rank_in_group, self._parts(way)
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
            own = rows_of_part(self._shapes(), parts, index, self.before.flat[rank])
            out = F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in own),
                is_causal=self.is_causal,
                scale=self.scale,
            ).transpose(1, 2)
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


def _chosen_way(
    call: _Call, run: Callable[[Way], torch.Tensor], beside: Sequence[int] = ()
) -> Way:
    """The way that this session takes for calls of a shape; the first call times them all.

    What it depends on is the same on all ranks, so that all choose, and choose alike.

    Args:
        call: its shape.
        run: makes the call by a way.
        beside: the sizes of what runs beside it.
    """
    query = call.sources[0]
    if WAY is not None or not query.is_cuda:
        return WAY or Way()
    held, group = get_runtime_state().workspaces, get_ulysses_group()
    batch, _, heads, channels = query.shape
    rows = (sum(call.query_lengths), sum(call.key_lengths))
    shape = (batch, *rows, heads, channels)
    key = ("way", *shape, query.dtype, call.is_causal, tuple(beside))
    if key not in held:
        if torch.cuda.is_current_stream_capturing():
            return Way()
        ways = different(WAYS, heads // group.world_size)
        held[key] = fastest(run, ways, group)
    way: Way = held[key]
    return way
