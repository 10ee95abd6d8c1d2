"""The keys of one attention call and the mask that belongs to them.

Shapes: B batch, K key rows, G key heads, D head dimension, H query heads, S query rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xfuser_runtime.distributed.layout import Range, TokenLayout
from xfuser_runtime.errors import InputError


@dataclass(frozen=True)
class KeyBlock:
    """Keys, values and their mask, which travel and are cached together.

    Args:
        key: (B, K, G, D).
        value: (B, K, G, Dv).
        mask: (B or 1, H or 1, 1, K), bool or additive, None for none.
    """

    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None = None

    @property
    def length(self) -> int:
        return self.key.shape[1]


@dataclass(frozen=True)
class SplitMask:
    """A call's mask, told apart by what it follows; at most one of the two is set.

    Args:
        keys: (B or 1, H or 1, 1, K_local), same for every query row: follows the keys.
        rows: (B or 1, H or 1, S_local, K_all), one row for every local query row, columns
            in the order of `key_order`.
    """

    keys: torch.Tensor | None = None
    rows: torch.Tensor | None = None


def split_mask(
    mask: torch.Tensor | None,
    *,
    query_rows: int,
    key_lengths: Sequence[int],
    key_rows: int,
    all_keys: int,
) -> SplitMask:
    """Tell what a mask follows, alike on every rank.

    Args:
        mask: broadcastable to (B, H, S_local, K), None for none.
        query_rows: query rows of this rank.
        key_lengths: key rows of every rank in this pass.
        key_rows: those of this rank.
        all_keys: keys of every patch and rank.

    Raises:
        InputError: the mask fits neither the local keys nor all keys.
    """
    if mask is None:
        return SplitMask()
    mask = mask[(None,) * (4 - mask.ndim)]
    rows, columns = mask.shape[-2:]
    # An expanded key mask has the same row everywhere: stride 0.
    same_rows = rows == 1 or mask.stride(-2) == 0
    no_columns = mask.new_zeros((*mask.shape[:2], 1, 0))
    # Where one rank holds all keys it cannot tell the two kinds apart by their columns, so
    # that all ranks decide alike the mask must be one for the keys.
    one_holder = len(key_lengths) > 1 and sum(n > 0 for n in key_lengths) == 1
    if rows in (1, query_rows):
        if columns == key_rows and (same_rows or columns == 0):
            if columns == 0:
                return SplitMask(keys=no_columns)
            if rows:
                return SplitMask(keys=mask[..., :1, :])
        elif columns == all_keys:
            if one_holder and key_rows == 0:
                return SplitMask(keys=no_columns)
            if not one_holder:
                return SplitMask(rows=mask.expand(-1, -1, query_rows, -1))
    raise InputError(
        f"a mask of shape {tuple(mask.shape)}, expected (B or 1, H or 1, 1, {key_rows}) for "
        f"this rank's keys or (B or 1, H or 1, {query_rows}, {all_keys}) for all keys; "
        "shard it along its keys or its query rows"
    )


def key_order(
    layout: TokenLayout, names: Sequence[str], patch: int | None
) -> tuple[tuple[str, int, int], ...]:
    """The order of all keys of a pass as (segment, start, stop): columns of an S x S mask.

    A whole pass has the order in which the ranks' rows are gathered, a patch pass that of
    the key/value cache, the rows of all patches included.
    """
    patches: Sequence[int | None] = (
        (None,) if patch is None else range(layout.num_patches)
    )
    return tuple(
        (name, start, stop)
        for each in patches
        for shard in range(layout.num_shards)
        for name in names
        for start, stop in layout.ranges(name, each, shard)
    )


def block_columns(
    layout: TokenLayout,
    names: Sequence[str],
    shards: Sequence[int],
    patches: Sequence[int] | None,
) -> tuple[Range, ...]:
    """Where the keys that `shards` hold stand in `key_order`, adjacent ranges merged.

    Args:
        layout: the layout of the pass.
        names: the segments of the keys.
        shards: the shards of one block.
        patches: the patches that the cache holds, None for a whole pass.
    """
    found: list[Range] = []
    offset = 0
    for patch in (None,) if patches is None else range(layout.num_patches):
        for shard, length in enumerate(layout.lengths(names, patch)):
            held = patches is None or patch in patches
            if length and held and shard in shards:
                if found and found[-1][1] == offset:
                    found[-1] = (found[-1][0], offset + length)
                else:
                    found.append((offset, offset + length))
            offset += length
    return tuple(found)


def take_columns(mask: torch.Tensor, ranges: Sequence[Range]) -> torch.Tensor:
    """The columns of a mask that lie in `ranges`, in their order."""
    pieces = [mask[..., start:stop] for start, stop in ranges]
    if not pieces:
        return mask[..., :0]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
