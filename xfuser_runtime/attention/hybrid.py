"""Ulysses inside ring, with the key/value cache between: how one parallel call runs.

    rows of all heads --ulysses--> all rows of a block, some heads --cache--> --ring--> back

A block is what the ranks of one Ulysses group hold together; shard r * U + u is rank u of block r.
Either degree may be 1. The Ulysses exchange alone is traced by torch.compile; with the ring or
the cache a wrapped module's call is one operation to it (`layers.attention_site.attend_at`).

Shapes: B batch, S_local query rows of this rank, H query heads, D head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from xfuser_runtime.attention import keys as masks
from xfuser_runtime.attention import ulysses
from xfuser_runtime.attention.backends import run_kernel
from xfuser_runtime.attention.kernels import KernelCall
from xfuser_runtime.attention.keys import KeyBlock, SplitMask
from xfuser_runtime.attention.ring import ring_attention
from xfuser_runtime.distributed.parallel_state import get_ring_group, get_ulysses_group
from xfuser_runtime.distributed.runtime_state import (
    get_runtime_state,
    runtime_state_is_initialized,
)

if TYPE_CHECKING:
    from xfuser_runtime.attention.api import AttentionPlan


def hybrid_attention(
    query: torch.Tensor,
    block: KeyBlock,
    row_mask: torch.Tensor | None,
    *,
    is_causal: bool,
    scale: float | None,
    plan: AttentionPlan,
) -> torch.Tensor:
    """Attention over the keys of all ranks and of the cache, (B, S_local, H, D).

    Args:
        query: local query rows.
        block: local keys and their key mask.
        row_mask: (B or 1, H or 1, S_local, K_all) or None, columns in `key_order`.
        is_causal: only where the gathered rows are in their natural order.
        scale: factor of the scores, None for D ** -0.5.
        plan: where the rows are.
    """
    group = get_ulysses_group()
    shards = _shards_of_block(get_ring_group().rank_in_group)
    query_lengths = _of(shards, plan.layout.lengths(plan.query_segments, plan.patch))
    if row_mask is None and _can_write_to_peers(query, block, plan):
        from xfuser_runtime.cuda import symmetric

        return symmetric.attention(
            query,
            block.key,
            block.value,
            query_lengths=query_lengths,
            key_lengths=_of(shards, plan.layout.lengths(plan.key_segments, plan.patch)),
            is_causal=is_causal,
            scale=scale,
        )
    if group.world_size > 1:
        heads = ulysses.split_heads(
            query.shape[2], block.key.shape[2], group.world_size
        )
        query, block = ulysses.rows_to_heads(
            query,
            block,
            heads=heads,
            query_lengths=query_lengths,
            key_lengths=_of(shards, plan.layout.lengths(plan.key_segments, plan.patch)),
            group=group,
        )
        if row_mask is not None:
            row_mask = ulysses.gather_mask_rows(
                row_mask, heads=heads, query_lengths=query_lengths, group=group
            )
    if plan.cache is None and get_ring_group().world_size == 1:
        mask = block.mask if row_mask is None else row_mask
        call = KernelCall(query, block.key, block.value, mask, is_causal, scale)
        out = run_kernel(call, name=plan.backend)[0]
    else:
        out = _over_cache_and_ring(query, block, row_mask, scale, plan)
    if group.world_size > 1:
        out = ulysses.heads_to_rows(
            out, heads=heads, query_lengths=query_lengths, group=group
        )
    return out


def _can_write_to_peers(
    query: torch.Tensor, block: KeyBlock, plan: AttentionPlan
) -> bool:
    """Whether this is plain Ulysses between GPUs that share their memory."""
    state = get_runtime_state() if runtime_state_is_initialized() else None
    return (
        state is not None
        and state.has_symmetric_memory
        and plan.cache is None
        and plan.backend is None
        and block.mask is None
        and get_ring_group().world_size == 1
        and query.shape[2] == block.key.shape[2]
        and query.shape[2] % get_ulysses_group().world_size == 0
        and query.shape[3] == block.value.shape[3]
    )


@torch.compiler.disable
def _over_cache_and_ring(
    query: torch.Tensor,
    block: KeyBlock,
    row_mask: torch.Tensor | None,
    scale: float | None,
    plan: AttentionPlan,
) -> torch.Tensor:
    """Put the block's rows into the cache, then attend to all blocks."""
    ring, names = get_ring_group(), plan.key_segments
    shards = _shards_of_block(ring.rank_in_group)
    patches: tuple[int, ...] | None = None
    if plan.cache is not None:
        plan.cache.store(
            block, layout=plan.layout, names=names, shards=shards, patch=plan.patch
        )
        if plan.patch is not None:
            # A whole pass attends to what it just gathered; a patch pass to the cache.
            patches = plan.cache.filled
            block = plan.cache.read(layout=plan.layout, names=names, shards=shards)
    columns = [
        masks.block_columns(plan.layout, names, _shards_of_block(r), patches)
        for r in range(ring.world_size)
    ]
    row_masks = (
        None
        if row_mask is None
        else [masks.take_columns(row_mask, ranges) for ranges in columns]
    )
    if ring.world_size == 1:
        mask = block.mask if row_masks is None else row_masks[0]
        call = KernelCall(query, block.key, block.value, mask, scale=scale)
        return run_kernel(call, name=plan.backend)[0]
    return ring_attention(
        query,
        block,
        lengths=[sum(stop - start for start, stop in ranges) for ranges in columns],
        row_masks=row_masks,
        scale=scale,
        backend=plan.backend,
        group=ring,
    )


def split_mask(
    attn_mask: torch.Tensor | None, query_rows: int, key_rows: int, plan: AttentionPlan
) -> SplitMask:
    """What the mask of a call follows: the local keys or the local query rows."""
    lengths = plan.layout.lengths(plan.key_segments, plan.patch)
    all_keys = sum(plan.layout.lengths(plan.key_segments, None))
    return masks.split_mask(
        attn_mask,
        query_rows=query_rows,
        key_lengths=lengths,
        key_rows=key_rows,
        all_keys=all_keys,
    )


def _shards_of_block(ring_rank: int) -> range:
    """The shards whose rows make up the block of one rank of the ring."""
    degree = get_ulysses_group().world_size
    return range(ring_rank * degree, (ring_rank + 1) * degree)


def _of(shards: range, lengths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(lengths[shard] for shard in shards)
