"""The key/value cache of PipeFusion: one for each attention call site and transformer call.

A whole pass fills it; a patch pass overwrites the rows of its patch and attends to all rows
filled so far, those of other patches being one step old. Rows are in the layout's cache order
[patch][shard][segment], so a patch is one contiguous range.

Shapes: B batch, K key rows in the cache, G key heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from xfuser_runtime.attention.keys import KeyBlock
from xfuser_runtime.distributed.layout import TokenLayout
from xfuser_runtime.errors import InputError


class KVCache:
    """Keys, values and key mask of the shards that this rank's heads see."""

    def __init__(self) -> None:
        self._key: torch.Tensor | None = None
        self._value: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None
        self._has_mask = False
        self._filled: tuple[int, ...] = ()

    @property
    def filled(self) -> tuple[int, ...]:
        """The patches whose rows are in the cache, ascending."""
        return self._filled

    def reset(self) -> None:
        """Forget all rows; the memory is kept for the next run."""
        self._filled = ()

    def store(
        self,
        block: KeyBlock,
        *,
        layout: TokenLayout,
        names: Sequence[str],
        shards: Sequence[int],
        patch: int | None,
    ) -> None:
        """Take in the keys of one pass.

        Args:
            block: the keys that `shards` hold in this pass, gathered in shard order.
            layout: token rows.
            names: the segments of the keys.
            shards: the shards whose rows this cache holds.
            patch: the patch of the pass, None for a whole pass.

        Raises:
            InputError: a patch whose batch, heads or data type are not those of the rows
                already held.
        """
        capacity = layout.cache_range(names, None, shards)[1]
        if patch is None or not self._filled:
            self._allocate(block, capacity)
        self._check(block, capacity)
        if patch is None:
            moves = layout.whole_to_cache(names, shards)
            self._filled = tuple(range(layout.num_patches))
        else:
            start, stop = layout.cache_range(names, patch, shards)
            moves = ((0, start, stop - start),)
            self._filled = tuple(sorted({*self._filled, patch}))
        self._write(block, moves)

    def read(
        self, *, layout: TokenLayout, names: Sequence[str], shards: Sequence[int]
    ) -> KeyBlock:
        """All rows filled so far, without a copy when these are the first patches or all."""
        assert self._key is not None and self._value is not None
        ranges = [layout.cache_range(names, patch, shards) for patch in self._filled]
        key, value = (_take(x, 1, ranges) for x in (self._key, self._value))
        mask = self._mask if self._has_mask else None
        return KeyBlock(key, value, None if mask is None else _take(mask, 3, ranges))

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        # A copied model is another model: it begins with nothing cached.
        return KVCache()

    def _allocate(self, block: KeyBlock, capacity: int) -> None:
        self._has_mask = False
        wanted = (block.key.shape[0], capacity, *block.key.shape[2:])
        self._key = kept_or_zeros(self._key, wanted, block.key)
        wanted = (*wanted[:3], block.value.shape[3])
        self._value = kept_or_zeros(self._value, wanted, block.value)

    def _check(self, block: KeyBlock, capacity: int) -> None:
        assert self._key is not None
        held, found = self._key, block.key
        expected = (held.shape[0], *held.shape[2:], held.dtype)
        if (found.shape[0], *found.shape[2:], found.dtype) != expected or (
            held.shape[1] != capacity
        ):
            raise InputError(
                f"keys of batch {found.shape[0]}, heads {found.shape[2]} and {found.dtype} in a "
                f"patch pass, expected {expected[0]}, {expected[1]} and {expected[3]} as in "
                "the key/value cache; run a whole pass when the batch or the image changes"
            )

    def _write(self, block: KeyBlock, moves: Sequence[tuple[int, int, int]]) -> None:
        assert self._key is not None and self._value is not None
        self._match_mask(block)
        for source, destination, length in moves:
            here = slice(destination, destination + length)
            there = slice(source, source + length)
            self._key[:, here] = block.key[:, there]
            self._value[:, here] = block.value[:, there]
            if self._has_mask:
                assert self._mask is not None
                if block.mask is None:
                    self._mask[..., here] = _no_mask(self._mask)
                else:
                    self._mask[..., here] = block.mask[..., there]

    def _match_mask(self, block: KeyBlock) -> None:
        """Have a mask as soon as one pass brings one; rows that came without one take part."""
        if block.mask is None or self._key is None:
            return
        if self._mask is None or not self._has_mask:
            wanted = (*block.mask.shape[:3], self._key.shape[1])
            self._mask = kept_or_zeros(self._mask, wanted, block.mask)
            self._mask.fill_(_no_mask(block.mask))
            self._has_mask = True
        elif self._mask.shape[:3] != block.mask.shape[:3]:
            shape = torch.broadcast_shapes(
                self._mask.shape[:3], block.mask.shape[:3]
            ) + (self._mask.shape[3],)
            self._mask = self._mask.expand(shape).clone()


def kept_or_zeros(
    held: torch.Tensor | None, shape: Sequence[int], like: torch.Tensor
) -> torch.Tensor:
    """A tensor kept from an earlier pass, its values too, where its memory can be written to
    as one of `shape`, of the type and on the device of `like`; zeros where it cannot.

    What keeps its address from call to call is what captured calls go on with.
    """
    if (
        held is not None
        and tuple(held.shape) == tuple(shape)
        and (held.dtype, held.device) == (like.dtype, like.device)
        # Written to outside of the mode, a tensor made inside of it is an error.
        and held.is_inference() == torch.is_inference_mode_enabled()
    ):
        return held
    return like.new_zeros(shape)


def _no_mask(mask: torch.Tensor) -> bool | float:
    return True if mask.dtype == torch.bool else 0.0


def _take(x: torch.Tensor, dim: int, ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
    if all(a[1] == b[0] for a, b in zip(ranges, ranges[1:], strict=False)):
        return x.narrow(dim, ranges[0][0], ranges[-1][1] - ranges[0][0])
    return torch.cat([x.narrow(dim, a, b - a) for a, b in ranges], dim=dim)
