"""A block region: one loop over transformer blocks, run on this rank's tokens.

Shapes: B batch, S tokens of a stream, S_local the tokens of this rank in this pass.

Before the loop every token-indexed value that reaches the blocks is cut to this rank's
rows (`shard`); between the blocks of two stages the carried streams travel
(`hand_over`); after the loop the carried streams are made whole again (`gather`), so that
all code around the loop sees what upstream's code sees.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from xfuser_runtime.attention import key_order
from xfuser_runtime.attention.cache import kept_or_zeros
from xfuser_runtime.distributed.collectives import all_gather
from xfuser_runtime.distributed.layout import TokenLayout
from xfuser_runtime.distributed.parallel_state import get_sp_group
from xfuser_runtime.transformers.stages import EmptyBlock

if TYPE_CHECKING:
    from xfuser_runtime.transformers.stages import StageLinks


class BlockRegion:
    """The state of one block loop in one forward pass.

    Args:
        layout: token rows by segment, patch and shard.
        patch: the patch of this pass, None for a whole pass.
        shard: this rank's place in its sequence-parallel group.
        call_index: which transformer call of the pass this is.
        links: what connects this stage with its neighbours, None for one stage.
        buffers: whole streams kept between patch passes, by stream name.
        needs_gather: False where this stage reads no stream after the loop.
        dry_run: shapes only: no block runs and nothing is sent.
        parts: segments of a stream that holds more than one, in order.
    """

    def __init__(
        self,
        *,
        layout: TokenLayout,
        patch: int | None,
        shard: int,
        call_index: int,
        links: StageLinks | None,
        buffers: dict[str, torch.Tensor],
        needs_gather: bool = True,
        dry_run: bool = False,
        parts: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.layout = layout
        self.patch = patch
        self.shard_index = shard
        self.call_index = call_index
        self._links = links
        self._buffers = buffers
        self._needs_gather = needs_gather
        self._dry_run = dry_run
        self._parts = dict(parts or {})
        self._iteration = 0
        self._gathers = 0
        #: Of the attention modules, the first that met masks over its tokens.
        self.first_site: object | None = None

    def __enter__(self) -> BlockRegion:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to undo: `with region:` keeps the indentation of a branch that is gone."""

    @property
    def whole(self) -> bool:
        """True when this rank holds every row of this pass in one piece."""
        return self.patch is None and self.layout.num_shards == 1

    def shard(
        self,
        value: Any,
        dim: int,
        *streams: str,
        ndim: int | None = None,
        repeated: bool = False,
    ) -> Any:
        """This rank's rows of `value` along `dim`, which holds `streams` in that order.

        Tensors inside tuples, lists and dicts are cut alike; None stays None.

        Args:
            value: what the blocks read.
            dim: the dimension that holds tokens.
            streams: whose tokens these are.
            ndim: for a value that some calls give by token and others once for all: the
                dimensions of one by token.  Another, or one of extent 1, stays whole.
            repeated: `dim` holds these tokens several times, once for each sample.

        Raises:
            ValueError: when `dim` does not hold exactly the tokens of the streams.
        """
        if self.whole or value is None:
            return value
        if isinstance(value, torch.Tensor):
            if ndim is not None and (value.ndim != ndim or value.shape[dim] == 1):
                return value
            if repeated:
                folded = value.unflatten(dim, (-1, self.length(streams)))
                return self._cut(folded, dim + 1, streams).flatten(dim, dim + 1)
            return self._cut(value, dim, streams)
        inner = functools.partial(self.shard, ndim=ndim, repeated=repeated)
        if isinstance(value, dict):
            return {k: inner(v, dim, *streams) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(inner(v, dim, *streams) for v in value)
        return value

    def shard_items(
        self, values: Sequence[Any], axes: Mapping[int, tuple[Any, ...]]
    ) -> tuple[Any, ...]:
        """This rank's rows of the items of a tuple that hold different streams.

        Args:
            values: the tuple; items without an axis stay whole.
            axes: for an item's index, (dim, stream, ...) as `shard` takes them.
        """
        return tuple(
            self.shard(value, *axes[index]) if index in axes else value
            for index, value in enumerate(values)
        )

    def shard_pairs(
        self, mask: torch.Tensor | None, rows: int, keys: int, *streams: str
    ) -> torch.Tensor | None:
        """A mask over pairs of tokens: this rank's query rows, all keys in their order.

        Args:
            mask: (..., S, S); None stays None.
            rows, keys: dimensions of the queries and of the keys.
            streams: whose tokens both dimensions hold.
        """
        if self.whole or mask is None:
            return mask
        names = self.expand(streams)
        offsets = dict(zip(names, self._offsets(names), strict=True))
        index = [
            offsets[name] + row
            for name, start, stop in key_order(self.layout, names, self.patch)
            for row in range(start, stop)
        ]
        columns = torch.tensor(index, device=mask.device)
        return self._cut(mask, rows, streams).index_select(keys, columns)

    def _offsets(self, names: Sequence[str]) -> list[int]:
        """Where each segment begins in a whole value that holds `names`."""
        lengths = {s.name: s.length for s in self.layout.segments}
        return list(accumulate((lengths[name] for name in names), initial=0))[:-1]

    def count_rows(self, rows: int, stream: str) -> int:
        """Rows of the image that this rank holds, of `rows` in the whole stream."""
        grain = self.length((stream,)) // rows
        names = self.expand((stream,))
        return self.layout.length(names, self.patch, self.shard_index) // grain

    def expand(self, streams: Sequence[str]) -> tuple[str, ...]:
        """The segments of streams, in the order in which they lie."""
        return tuple(
            part for name in streams for part in self._parts.get(name, (name,))
        )

    def rows(self, *streams: str) -> int:
        """Tokens of streams that this rank holds in this pass."""
        return self.layout.length(self.expand(streams), self.patch, self.shard_index)

    def owns(self, block: nn.Module) -> bool:
        """True when this stage runs `block`."""
        return not self._dry_run and not isinstance(block, EmptyBlock)

    def hand_over(self, *streams: Any) -> Any:
        """Move the carried streams to this stage where its first block begins.

        Called once at the top of each iteration.  The sender and the receiver stand at the
        same place of the same loop, so nothing that the loop's body did to the streams is
        lost.  Lists of tensors, as long on every stage, travel item by item.  Returns the
        streams, one bare or several as a tuple.
        """
        index, self._iteration = self._iteration, self._iteration + 1
        if self._links is not None and not self._dry_run:
            streams = self._links.exchange(index, streams)
        # A block may return parts of one tensor: the next is to see them as the first did.
        streams = tuple(
            (
                _dense(value)
                if isinstance(value, torch.Tensor) and value.is_contiguous()
                else value
            )
            for value in streams
        )
        return streams[0] if len(streams) == 1 else streams

    def gather(
        self, value: Any, dim: int, *streams: str, ndim: int | None = None
    ) -> Any:
        """The whole of a carried stream from the rows of all ranks and earlier passes.

        The tensors of a list are gathered one by one.

        Args:
            value: what the blocks made.
            dim: the dimension that holds tokens.
            streams: whose tokens these are.
            ndim: where only some of the tensors hold tokens: the dimensions of these.
        """
        if isinstance(value, (tuple, list)):
            return type(value)(
                self.gather(item, dim, *streams, ndim=ndim) for item in value
            )
        # Every value has whole rows of its own to fill, told by its turn.
        self._gathers += 1
        if ndim is not None and value is not None and value.ndim != ndim:
            return value
        return self._gathered(value, dim, streams, f"[{self._gathers}]")

    def _gathered(
        self, value: Any, dim: int, streams: Sequence[str], place: str
    ) -> Any:
        if self.whole or value is None or self._dry_run:
            return self._whole_shape(value, dim, streams)
        if not self._needs_gather:
            return self._whole_shape(value, dim, streams)
        lengths = self.layout.lengths(self.expand(streams), self.patch)
        rows = all_gather(value, dim, lengths, get_sp_group())
        return self._merge(rows, dim, streams, place)

    def _cut(
        self, value: torch.Tensor, dim: int, streams: Sequence[str]
    ) -> torch.Tensor:
        lengths = {s.name: s.length for s in self.layout.segments}
        expected = self.length(streams)
        if value.shape[dim] != expected:
            raise ValueError(
                f"dimension {dim} of a value of shape {tuple(value.shape)} holds "
                f"{value.shape[dim]} rows, expected {expected} tokens of "
                f"{', '.join(streams)}; the port does not fit this input: run porter verify"
            )
        pieces = []
        offset = 0
        for name in self.expand(streams):
            for start, stop in self.layout.ranges(name, self.patch, self.shard_index):
                pieces.append(value.narrow(dim, offset + start, stop - start))
            offset += lengths[name]
        return _join(pieces, value, dim)

    def _merge(
        self, rows: torch.Tensor, dim: int, streams: Sequence[str], place: str
    ) -> torch.Tensor:
        """Rows in the order [shard][stream] put to their places in a whole tensor."""
        lengths = {s.name: s.length for s in self.layout.segments}
        whole = self._buffer(rows, dim, streams, place)
        source = 0
        for shard in range(self.layout.num_shards):
            offset = 0
            for name in self.expand(streams):
                for start, stop in self.layout.ranges(name, self.patch, shard):
                    count = stop - start
                    whole.narrow(dim, offset + start, count).copy_(
                        rows.narrow(dim, source, count)
                    )
                    source += count
                offset += lengths[name]
        # The caller may write to what it gets, or keep it, and the next patch writes to what
        # is kept here: neither may see the other.
        return whole if self.layout.num_patches == 1 else whole.clone()

    def _buffer(
        self, rows: torch.Tensor, dim: int, streams: Sequence[str], place: str
    ) -> torch.Tensor:
        key = "+".join(streams) + place
        shape = list(rows.shape)
        shape[dim] = self.length(streams)
        held = kept_or_zeros(self._buffers.get(key), shape, rows)
        if self.layout.num_patches > 1:
            self._buffers[key] = held
        return held

    def length(self, streams: Sequence[str]) -> int:
        """Tokens of whole streams."""
        lengths = {s.name: s.length for s in self.layout.segments}
        return sum(lengths[name] for name in self.expand(streams))

    def _whole_shape(self, value: Any, dim: int, streams: Sequence[str]) -> Any:
        if value is None:
            return None
        length = self.length(streams)
        if value.shape[dim] == length:
            return value
        shape = list(value.shape)
        shape[dim] = length
        return value.new_zeros(shape)


def _join(pieces: Iterable[torch.Tensor], like: torch.Tensor, dim: int) -> torch.Tensor:
    held = [piece for piece in pieces if piece.shape[dim]]
    if not held:
        return like.narrow(dim, 0, 0)
    return _dense(held[0]) if len(held) == 1 else torch.cat(held, dim=dim)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """`x` with the strides of a fresh tensor, copied only where it must be.

    Blocks return fresh tensors: with other strides the first block would be compiled apart.
    """
    if x.is_contiguous():
        # A dimension of one keeps the stride of the whole that it was cut from.
        return x.reshape(-1).view(x.shape)
    return x.contiguous()
