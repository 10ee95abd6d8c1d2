"""One function for every attention call under sequence parallelism and PipeFusion.

Shapes: B batch, S_local rows of this rank in this pass, H query heads, G key heads (H a multiple
of G), D head dimension. All tensors are (B, S_local, H, D); which rows these are, the layout
says. Inference only: gradients do not flow through the exchange.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xfuser_runtime.attention.backends import run_kernel
from xfuser_runtime.attention.cache import KVCache
from xfuser_runtime.attention.hybrid import hybrid_attention, split_mask
from xfuser_runtime.attention.kernels import KernelCall
from xfuser_runtime.attention.keys import KeyBlock
from xfuser_runtime.distributed.layout import TokenLayout
from xfuser_runtime.distributed.parallel_state import get_ring_group, get_sp_group
from xfuser_runtime.errors import InputError


@dataclass(frozen=True)
class AttentionPlan:
    """Where the rows of one attention call are.

    Args:
        layout: token rows of the region by segment, patch and shard.
        query_segments: the segments that the query rows belong to, in their order.
        key_segments: those of the keys.
        patch: the patch of this pass, None for a whole pass.
        cache: this call site's keys and values of the other patches; None without
            PipeFusion.
        backend: name of the kernel (`backends.backend_names`), None to choose.
    """

    layout: TokenLayout
    query_segments: tuple[str, ...]
    key_segments: tuple[str, ...]
    patch: int | None = None
    cache: KVCache | None = None
    backend: str | None = None


def parallel_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    plan: AttentionPlan,
) -> torch.Tensor:
    """Scaled dot-product attention of the local queries over the keys of all ranks.

    Args:
        query: (B, S_local, H, D).
        key: (B, K_local, G, D).
        value: (B, K_local, G, Dv).
        attn_mask: bool (True takes part) or additive in the query's type. With a last
            dimension of K_local it is a key mask, the same for all query rows, and goes
            with the keys: gathered, rotated and cached. With a last dimension of all keys
            it has the local query rows and columns in `keys.key_order`.
        is_causal: refused unless the gathered rows are in their natural order.
        scale: factor of the scores, None for D ** -0.5.
        enable_gqa: allow G < H.
        plan: where the rows are, and the cache.

    Returns:
        (B, S_local, H, Dv). Rows without any key to attend to are zeros under ring
        attention, and whatever torch gives them otherwise.

    Raises:
        InputError: shapes that do not fit the plan, a mask that fits neither form,
            `is_causal` where it cannot be right, or a kernel that cannot take the call.
    """
    _check_shapes(query, key, value, enable_gqa, plan)
    alone = get_sp_group().world_size == 1 and plan.cache is None
    if is_causal:
        _check_causal(attn_mask, plan)
    if alone:
        call = KernelCall(query, key, value, attn_mask, is_causal, scale)
        return run_kernel(call, name=plan.backend)[0]
    split = split_mask(attn_mask, query.shape[1], key.shape[1], plan)
    return hybrid_attention(
        query,
        KeyBlock(key, value, split.keys),
        split.rows,
        is_causal=is_causal,
        scale=scale,
        plan=plan,
    )


def _check_shapes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    enable_gqa: bool,
    plan: AttentionPlan,
) -> None:
    if not query.dtype == key.dtype == value.dtype:
        raise InputError(
            f"query, key and value of types {query.dtype}, {key.dtype} and {value.dtype}, "
            "expected one type; cast them before the attention call"
        )
    heads, key_heads = query.shape[2], key.shape[2]
    if heads != key_heads and (not enable_gqa or heads % key_heads):
        raise InputError(
            f"{heads} query heads and {key_heads} key heads, expected as many, or with "
            "enable_gqa a multiple"
        )
    group = get_sp_group()
    if plan.layout.num_shards != group.world_size:
        raise InputError(
            f"a layout of {plan.layout.num_shards} shards on {group.world_size} "
            "sequence-parallel ranks, expected as many shards as ranks"
        )
    if plan.patch is not None and plan.cache is None:
        raise InputError(
            f"a pass over patch {plan.patch} without a key/value cache, expected one; "
            "a patch alone does not have the other patches' keys"
        )
    shard = group.rank_in_group
    for what, x, names in (
        ("query", query, plan.query_segments),
        ("key", key, plan.key_segments),
    ):
        expected = plan.layout.length(names, plan.patch, shard)
        if x.shape[1] != expected:
            raise InputError(
                f"{x.shape[1]} {what} rows on shard {shard}, expected {expected} of "
                f"{', '.join(names)}; the port does not fit this input: run porter verify"
            )


def _check_causal(attn_mask: torch.Tensor | None, plan: AttentionPlan) -> None:
    if attn_mask is not None:
        raise InputError("is_causal together with a mask, expected one of the two")
    single = get_sp_group().world_size == 1
    natural = plan.query_segments == plan.key_segments and (
        single or (len(plan.key_segments) == 1 and plan.layout.num_patches == 1)
    )
    if plan.cache is None and (
        single or (natural and get_ring_group().world_size == 1)
    ):
        return
    raise InputError(
        "is_causal on sharded tokens whose order is not the sequence's, expected Ulysses "
        "alone over one segment without patches; pass the mask itself or run this call "
        "on whole tensors"
    )
