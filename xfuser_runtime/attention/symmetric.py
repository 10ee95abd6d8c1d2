"""Ulysses between GPUs that can write to each other's memory: no message, no extra copy.

Each rank writes the heads of the others straight to where they are read: one copy takes the
place of packing, sending and unpacking. Then all meet at a barrier on the device. Between two
H200s the exchange of query, key and value of FLUX at 1024 pixels takes 105 us instead of the
186 us of an all-to-all with its copies (measured in a CUDA graph, torch 2.11).

Two workspaces take turns, one before and one after attention, so that one barrier for each
is enough: whoever has passed a barrier knows that the others have read the workspace before.

Shapes: B batch, S_r rows of rank r, H heads, h = H / U those of one rank, D head dimension.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from xfuser_runtime.distributed.parallel_state import Group, get_ulysses_group
from xfuser_runtime.distributed.runtime_state import get_runtime_state

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Workspace:
    """Memory of every rank that all ranks can write to.

    Args:
        flat: by rank, 1-d tensors of one size; this rank's own among them.
        handle: has `barrier(channel)`.
    """

    flat: tuple[torch.Tensor, ...]
    handle: Any


def is_usable(group: Group) -> bool:
    """Whether the ranks of `group` can write to each other; a collective call.

    All are of one host, with peer access between all devices, and torch can map their memory.
    """
    size = group.world_size
    if size == 1 or not torch.cuda.is_available():
        return False
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) < torch.distributed.get_world_size():
        return False
    if os.environ.get("NCCL_P2P_DISABLE", "0") not in ("", "0"):
        return False
    here = torch.cuda.current_device()
    count = torch.cuda.device_count()
    reachable = all(
        torch.cuda.can_device_access_peer(here, other)
        for other in range(count)
        if other != here
    )
    flag = torch.tensor([int(reachable)], device="cuda")
    torch.distributed.all_reduce(
        flag, torch.distributed.ReduceOp.MIN, group=group.process_group
    )
    if not flag.item():
        return False
    try:
        allocate(1024, torch.uint8, group)
    except RuntimeError as error:
        logger.warning("no symmetric memory, Ulysses sends messages: %s", error)
        return False
    return True


def allocate(numel: int, dtype: torch.dtype, group: Group) -> Workspace:
    """Memory that all ranks of `group` map; a collective call."""
    from torch.distributed import _symmetric_memory

    own = _symmetric_memory.empty(numel, dtype=dtype, device="cuda")
    handle = _symmetric_memory.rendezvous(own, group.process_group)
    flat = tuple(
        own if rank == group.rank_in_group else handle.get_buffer(rank, (numel,), dtype)
        for rank in range(group.world_size)
    )
    return Workspace(flat, handle)


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
    rank = group.rank_in_group
    batch, _, heads, channels = query.shape
    per_head = batch * channels
    local = heads // group.world_size
    rows = sum(query_lengths), sum(key_lengths)
    before = _workspace("rows", (rows[0] + 2 * rows[1]) * local * per_head, query)
    after = _workspace("heads", max(query_lengths) * heads * per_head, query)
    shapes = [(batch, n, local, channels) for n in (rows[0], rows[1], rows[1])]
    for peer, flat in enumerate(before.flat):
        views = carve(flat, shapes)
        for x, view, lengths in zip(
            (query, key, value),
            views,
            (query_lengths, key_lengths, key_lengths),
            strict=True,
        ):
            write_heads(x, view, peer, rank, lengths)
    before.handle.barrier(channel=0)
    q, k, v = (x.transpose(1, 2) for x in carve(before.flat[rank], shapes))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)
    for peer, flat in enumerate(after.flat):
        shape = (batch, query_lengths[peer], heads, channels)
        write_rows(
            out.transpose(1, 2), carve(flat, [shape])[0], peer, rank, query_lengths
        )
    after.handle.barrier(channel=0)
    return carve(after.flat[rank], [tuple(query.shape)])[0].clone()


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


def carve(flat: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Dense views one after another in flat memory."""
    views, start = [], 0
    for shape in shapes:
        numel = torch.Size(shape).numel()
        views.append(flat[start : start + numel].view(shape))
        start += numel
    return views


def write_heads(
    x: torch.Tensor, target: torch.Tensor, peer: int, rank: int, lengths: Sequence[int]
) -> None:
    """Put the peer's heads of this rank's rows (B, S_local, H, D) into its (B, S, h, D)."""
    local = target.shape[2]
    start = sum(lengths[:rank])
    target[:, start : start + lengths[rank]].copy_(
        x[:, :, peer * local : (peer + 1) * local]
    )


def write_rows(
    x: torch.Tensor, target: torch.Tensor, peer: int, rank: int, lengths: Sequence[int]
) -> None:
    """Put the peer's rows of this rank's heads (B, S, h, D) into its (B, S_peer, H, D)."""
    local = x.shape[2]
    start = sum(lengths[:peer])
    target[:, :, rank * local : (rank + 1) * local].copy_(
        x[:, start : start + lengths[peer]]
    )


def _workspace(use: str, numel: int, like: torch.Tensor) -> Workspace:
    """The session's workspace; the first call of a size makes it, on all ranks alike."""
    held = get_runtime_state().workspaces
    key = (use, numel, like.dtype)
    if key not in held:
        held[key] = allocate(numel, like.dtype, get_ulysses_group())
    return held[key]
