"""Masks over pairs of tokens that are the outer product of one vector with itself.

Such a mask is built inside a block from the tokens that the block sees, so a rank builds
the square of its own tokens. Its diagonal is the vector (True and True is True, 1 x 1 is
1), and the vector of all tokens gives the rank's rows of the whole mask.

Shapes: B batch, S_local query rows of this rank, K keys of all ranks and patches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from xfuser_runtime.distributed.collectives import all_gather
from xfuser_runtime.distributed.parallel_state import get_sp_group
from xfuser_runtime.errors import InputError

if TYPE_CHECKING:
    from xfuser_runtime.attention.api import AttentionPlan


class MaskVector:
    """The vector behind the mask of one attention call, for the keys of all patches."""

    def __init__(self) -> None:
        self._kept: torch.Tensor | None = None  # (B or 1, H or 1, K), in cache order

    def reset(self) -> None:
        """Forget it."""
        self._kept = None

    def complete(
        self, mask: torch.Tensor, form: str, plan: AttentionPlan
    ) -> torch.Tensor:
        """This rank's rows of the whole mask, columns in `key_order`.

        Args:
            mask: (B or 1, H or 1, S_local, S_local), this rank's square of it.
            form: "and" of bools or "product" of zeros and ones.
            plan: where the rows are.

        Returns:
            (B or 1, H or 1, S_local, K).

        Raises:
            InputError: the queries are not the keys, or the mask is no square.
        """
        mask = mask[(None,) * (4 - mask.ndim)]
        rows, columns = mask.shape[-2:]
        if rows != columns or plan.query_segments != plan.key_segments:
            raise InputError(
                f"a mask of {rows} by {columns} on {', '.join(plan.query_segments)} and "
                f"{', '.join(plan.key_segments)}, expected a square over the same tokens; "
                "the port does not fit this input: run porter verify"
            )
        own = torch.diagonal(mask, dim1=-2, dim2=-1)
        names = plan.key_segments
        group = get_sp_group()
        lengths = plan.layout.lengths(names, plan.patch)
        gathered = all_gather(own, own.ndim - 1, lengths, group)
        every = self._of_all_patches(gathered, plan)
        if form == "and":
            return own[..., :, None] & every[..., None, :]
        return own[..., :, None] * every[..., None, :]

    def _of_all_patches(
        self, gathered: torch.Tensor, plan: AttentionPlan
    ) -> torch.Tensor:
        """The vector of all keys; those of other patches are the ones seen last."""
        layout, names = plan.layout, plan.key_segments
        shards = range(layout.num_shards)
        if plan.cache is None:
            return gathered
        total = layout.cache_range(names, None, shards)[1]
        shape = (*gathered.shape[:-1], total)
        if self._kept is None or self._kept.shape != shape:
            self._kept = gathered.new_zeros(shape)
        if plan.patch is None:
            for source, destination, length in layout.whole_to_cache(names, shards):
                self._kept[..., destination : destination + length] = gathered[
                    ..., source : source + length
                ]
            return gathered
        start, stop = layout.cache_range(names, plan.patch, shards)
        self._kept[..., start:stop] = gathered
        return self._kept
