"""Memory of a GPU that others write to, and the stream that what travels runs on."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from xfuser_runtime.distributed.parallel_state import Group
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


class Beside:
    """A stream that runs beside the kernels of the current one; on CPU all runs in order.

    Args:
        device: of the kernels.
        use: what the stream is for; a session has one stream for a use.
    """

    def __init__(self, device: torch.device, use: str) -> None:
        self._stream: Any = None
        if device.type == "cuda":
            held = get_runtime_state().workspaces
            # Ahead of kernels that wait for room: what travels, others wait for.
            key = ("stream", use, device)
            if key not in held:
                held[key] = torch.cuda.Stream(device, priority=-1)
            self._stream = held[key]

    def follow(self) -> None:
        """What runs beside from here on comes after all kernels so far."""
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
        """What was launched beside so far."""
        return None if self._stream is None else self._stream.record_event()

    def wait_for(self, mark: Any) -> None:
        """Kernels from here on come after what was launched beside up to `mark`."""
        if mark is not None:
            torch.cuda.current_stream().wait_event(mark)


def peers_of(group: Group) -> list[int]:
    """The other ranks; each begins with the next one, so that no rank is written by all."""
    size = group.world_size
    return [(group.rank_in_group + i) % size for i in range(1, size)]
