"""Attention call sites: which token streams their rows are, and what passes leave there.

Shapes: B batch, S_local query rows of this rank in this pass, K_local its key rows, H query heads,
G key heads, D head dimension.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch

from xfuser_runtime.attention.api import AttentionPlan, parallel_attention
from xfuser_runtime.attention.cache import KVCache
from xfuser_runtime.attention.outer_mask import MaskVector
from xfuser_runtime.distributed.runtime_state import active_region
from xfuser_runtime.errors import InputError
from xfuser_runtime.layers.base import CallSites

#: All sites by their numbers, for compiled code.
_SITES: weakref.WeakValueDictionary[int, AttentionSite] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


class AttentionSite:
    """What a wrapped attention module keeps beside its weights.

    Args:
        query_segments: the token streams of its query rows, in their order.
        key_segments: those of its keys; empty where the keys are whole on every rank.
        whole: those of its keys that every rank has whole, beside keys that are cut.
        outer_mask: how its mask is made of one vector over the tokens, see `MaskVector`.
    """

    def __init__(
        self,
        query_segments: tuple[str, ...],
        key_segments: tuple[str, ...],
        whole: tuple[str, ...] = (),
        outer_mask: str | None = None,
    ) -> None:
        self.query_segments = query_segments
        self.key_segments = key_segments
        self.whole = whole
        self.outer_mask = outer_mask
        self.caches: CallSites[KVCache] = CallSites(KVCache)
        self.mask_vectors: CallSites[MaskVector] = CallSites(MaskVector)
        number = next(_NUMBERS)
        _SITES[number] = self
        # A tensor, because torch.compile would guard on a number: all alike blocks share a code.
        self.number = torch.tensor(number, device="cpu")

    def __deepcopy__(self, memo: dict[int, Any]) -> AttentionSite:
        # A copied module belongs to another model: it begins with nothing kept.
        return AttentionSite(
            self.query_segments, self.key_segments, self.whole, self.outer_mask
        )

    def plan(self, region: Any, backend: str | None) -> AttentionPlan:
        """Where the rows of the next attention call in this pass are."""
        return AttentionPlan(
            layout=region.layout,
            query_segments=region.expand(self.query_segments),
            key_segments=region.expand(self.key_segments),
            patch=region.patch,
            cache=self.caches.next(region) if region.layout.num_patches > 1 else None,
            backend=backend,
        )

    def own_keys(self, region: Any, keys: torch.Tensor, dim: int) -> torch.Tensor:
        """Keys without the rows that every rank has and another rank, or patch, answers for.

        All ranks' keys take part in attention, so each must come from one rank alone.

        Args:
            region: the region of the pass.
            keys: keys, values, or a mask over them.
            dim: dimension of the keys.
        """
        if not self.whole or region.whole:
            return keys
        pieces, offset = [], 0
        for name in region.expand(self.key_segments):
            rows = region.layout.ranges(name, region.patch, region.shard_index)
            count = sum(stop - start for start, stop in rows)
            if name not in self.whole:
                pieces.append(keys.narrow(dim, offset, count))
            else:
                count = region.length((name,))
                pieces += [keys.narrow(dim, offset + a, b - a) for a, b in rows]
            offset += count
        if keys.shape[dim] != offset:
            raise InputError(
                f"keys of shape {tuple(keys.shape)}, expected {offset} rows of "
                f"{', '.join(self.key_segments)}; the port does not fit this input: run "
                "porter verify"
            )
        return torch.cat(pieces, dim=dim)


def attend(
    site: AttentionSite,
    region: Any,
    backend: str | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """`parallel_attention` of a site's call in the pass of `region`."""
    plan = site.plan(region, backend)
    if site.outer_mask is not None and attn_mask is not None:
        vector = site.mask_vectors.next(region)
        attn_mask = vector.complete(attn_mask, site.outer_mask, plan)
    elif attn_mask is not None and attn_mask.shape[-1] == key.shape[1]:
        attn_mask = site.own_keys(region, attn_mask, -1)
    return parallel_attention(
        query,
        site.own_keys(region, key, 1),
        site.own_keys(region, value, 1),
        attn_mask=attn_mask,
        plan=plan,
        **options,
    )


def attend_at(
    number: torch.Tensor,
    backend: str | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`attend` in compiled code, as one operation that torch.compile does not look into.

    Caches are counted and filled, and blocks travel, in Python: traced, each pass would be
    compiled again, and a call outside of the graphs would cut every block into seven.
    """
    return torch.ops.xfuser_runtime.attend(
        query, key, value, attn_mask, is_causal, scale, enable_gqa, backend, number
    )


@torch.library.custom_op("xfuser_runtime::attend", mutates_args=())
def _attend_operation(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backend: str | None,
    number: torch.Tensor,
) -> torch.Tensor:
    out = attend(
        _SITES[int(number)],
        active_region(),
        backend,
        query,
        key,
        value,
        attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    return out.contiguous()


@_attend_operation.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *options: Any
) -> torch.Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))
