"""Ulysses between GPUs that can write to each other's memory: no message, no extra copy.

Each rank writes the heads of the others straight to where they are read: one copy takes the
place of packing, sending and unpacking. Then all meet at a barrier on the device.

The heads of a rank are cut into parts. Transfers run on a stream of their own, so that one part
travels while another is computed:

    transfers   write 0 | barrier | write 1 | barrier |   back 0     | back 1 | barrier
    kernels     own rows          | attention 0       | attention 1  | ...............

Two workspaces take turns, one before and one after attention: whoever has passed the last
barrier of one knows that the others have read the other.

Shapes: B batch, S_r rows of rank r, H heads, h = H / U those of one rank, D head dimension.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from xfuser_runtime.distributed.layout import Range
from xfuser_runtime.distributed.parallel_state import Group, get_ulysses_group
from xfuser_runtime.distributed.runtime_state import get_runtime_state

logger = logging.getLogger(__name__)

#: Parts that the heads of a rank are cut into, where each part still fills the device.
NUM_PARTS = 2
#: Query rows that one program of an attention kernel takes.
_ROWS_OF_PROGRAM = 128
#: Copies move this type where they can: 16 bytes in one instruction.
_WIDE = torch.complex128


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
    rank, peers = group.rank_in_group, _peers(group)
    batch, _, heads, channels = query.shape
    local = heads // group.world_size
    rows = sum(query_lengths), sum(key_lengths)
    numel = batch * channels
    before = _workspace("rows", (rows[0] + 2 * rows[1]) * local * numel, query)
    after = _workspace("heads", max(query_lengths) * heads * numel, query)
    shapes = [(batch, n, local, channels) for n in (rows[0], rows[1], rows[1])]
    lengths = (query_lengths, key_lengths, key_lengths)
    beside = _Beside(query.device)
    parts = head_parts(local, num_parts(batch * local, rows[0], query.device))

    def spread(peer: int, part: Range) -> None:
        targets = carve(before.flat[peer], shapes)
        for x, target, n in zip((query, key, value), targets, lengths, strict=True):
            write_heads(x, target, peer, rank, n, part)

    arrived = []
    beside.follow()
    for part in parts:
        with beside.running():
            for peer in peers:
                spread(peer, part)
            before.handle.barrier(channel=0)
            arrived.append(beside.mark())
    spread(rank, (0, local))
    own = carve(before.flat[rank], shapes)
    result = torch.empty_like(query, memory_format=torch.contiguous_format)
    held = []
    for part, ready in zip(parts, arrived, strict=True):
        beside.wait_for(ready)
        q, k, v = (x[:, :, slice(*part)].transpose(1, 2) for x in own)
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=scale
        ).transpose(1, 2)
        # Transfers read it: its memory is given back once they are done.
        held.append(out)
        beside.follow()
        with beside.running():
            for peer in peers:
                shape = (batch, query_lengths[peer], heads, channels)
                target = carve(after.flat[peer], [shape])[0]
                write_rows(out, target, peer, rank, query_lengths, part)
        write_rows(out, result, rank, rank, query_lengths, part)
    with beside.running():
        after.handle.barrier(channel=0)
        done = beside.mark()
    beside.wait_for(done)
    theirs = carve(after.flat[rank], [tuple(query.shape)])[0]
    for start, stop in ((0, rank * local), ((rank + 1) * local, heads)):
        _copy(result[:, :, start:stop], theirs[:, :, start:stop])
    return result


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


def num_parts(programs: int, rows: int, device: torch.device) -> int:
    """Parts of the heads: `NUM_PARTS` where one part is enough work for the whole device.

    Args:
        programs: samples times heads of a rank.
        rows: query rows of each.
        device: where attention runs.
    """
    if device.type != "cuda":
        return NUM_PARTS
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    waves = programs * -(-rows // _ROWS_OF_PROGRAM) // processors
    return max(1, min(NUM_PARTS, waves))


def head_parts(count: int, parts: int) -> list[Range]:
    """The heads 0 to `count` in at most `parts` ranges, none of them empty."""
    parts = min(count, parts)
    return [(i * count // parts, (i + 1) * count // parts) for i in range(parts)]


def write_heads(
    x: torch.Tensor,
    target: torch.Tensor,
    peer: int,
    rank: int,
    lengths: Sequence[int],
    part: Range | None = None,
) -> None:
    """Put the peer's heads of this rank's rows (B, S_local, H, D) into its (B, S, h, D).

    `part` are the heads of the h that are written, None for all.
    """
    local, start = target.shape[2], sum(lengths[:rank])
    first, last = part or (0, local)
    _copy(
        target[:, start : start + lengths[rank], first:last],
        x[:, :, peer * local + first : peer * local + last],
    )


def write_rows(
    x: torch.Tensor,
    target: torch.Tensor,
    peer: int,
    rank: int,
    lengths: Sequence[int],
    part: Range | None = None,
) -> None:
    """Put the peer's rows of this rank's heads (B, S, h, D) into its (B, S_peer, H, D).

    With `part`, x holds these heads of the h alone.
    """
    first, last = part or (0, x.shape[2])
    local = target.shape[2] // len(lengths)
    start = sum(lengths[:peer])
    _copy(
        target[:, :, rank * local + first : rank * local + last],
        x[:, start : start + lengths[peer]],
    )


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """`target.copy_(source)`, 16 bytes at a time where both lie so."""
    if target.numel():
        pair = _widened(target), _widened(source)
        if pair[0] is None or pair[1] is None:
            pair = target, source
        pair[0].copy_(pair[1])


def _widened(x: torch.Tensor) -> torch.Tensor | None:
    """`x` as elements of 16 bytes; None where its rows do not begin and end on these."""
    width = _WIDE.itemsize // x.element_size()
    aligned = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    if x.stride(-1) != 1 or any(n % width for n in aligned):
        return None
    return x.view(_WIDE)


class _Beside:
    """The stream that transfers run on beside the kernels; on CPU all runs in order."""

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = None
        if device.type == "cuda":
            held = get_runtime_state().workspaces
            # Ahead of kernels that wait for room: what travels, others wait for.
            if ("stream", device) not in held:
                held["stream", device] = torch.cuda.Stream(device, priority=-1)
            self._stream = held["stream", device]

    def follow(self) -> None:
        """Transfers from here on come after all kernels so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """What is launched inside runs beside the kernels."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Any:
        """The transfers so far."""
        return None if self._stream is None else self._stream.record_event()

    def wait_for(self, mark: Any) -> None:
        """Kernels from here on come after the transfers up to `mark`."""
        if mark is not None:
            torch.cuda.current_stream().wait_event(mark)


def _peers(group: Group) -> list[int]:
    """The other ranks; each begins with the next one, so that no rank is written by all."""
    size = group.world_size
    return [(group.rank_in_group + i) % size for i in range(1, size)]


def _workspace(use: str, numel: int, like: torch.Tensor) -> Workspace:
    """The session's workspace; the first call of a size makes it, on all ranks alike."""
    held = get_runtime_state().workspaces
    key = (use, numel, like.dtype)
    if key not in held:
        held[key] = allocate(numel, like.dtype, get_ulysses_group())
    return held[key]
