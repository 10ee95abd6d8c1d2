"""Memory that forked ranks share, in the place of memory that GPUs share."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.distributed as dist

from xfuser_runtime.config import EngineConfig, ParallelConfig
from xfuser_runtime.cuda import exchange
from xfuser_runtime.cuda.peer_memory import Workspace
from xfuser_runtime.distributed.launch import prepare_environment
from xfuser_runtime.distributed.parallel_state import Group


class SharedMemory:
    """Two workspaces for the ranks of one Ulysses group; made before the ranks are forked.

    Args:
        degree: ranks.
        numel: elements of a workspace, at the most.
        dtype: of the elements, NaN until they are written.
    """

    def __init__(self, degree: int, numel: int, dtype: torch.dtype) -> None:
        self._degree = degree
        self._used = 0
        nothing = torch.full((numel,), float("nan"), dtype=dtype)
        self._pool = [nothing.clone().share_memory_() for _ in range(2 * degree)]

    def enter(self) -> None:
        """Start the session of a rank, whose exchanges use this memory."""
        degrees = ParallelConfig(ulysses_degree=self._degree)
        prepare_environment(EngineConfig(degrees, world_size=self._degree))
        exchange.allocate = self._allocate  # type: ignore[assignment]

    def _allocate(self, count: int, dtype: torch.dtype, group: Group) -> Workspace:
        first = self._used * self._degree
        self._used += 1
        flat = tuple(self._pool[first + rank][:count] for rank in range(self._degree))
        return Workspace(flat, SimpleNamespace(barrier=lambda channel: dist.barrier()))
