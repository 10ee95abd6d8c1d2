"""Work on a stream as CUDA graphs, with steps between them, and the memory that graphs share."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch


class GraphPool:
    """Memory of graphs, for as long as this is held: torch ends a pool with the last of its graphs."""

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self._graph = torch.cuda.CUDAGraph()
        _capture_one_kernel(self._graph, self.handle)


class GraphRecorder:
    """Within `with`: work on the current stream becomes graphs, with steps between them.

    Args:
        pool: the memory of the graphs.
    """

    def __init__(self, pool: GraphPool) -> None:
        self._pool = pool
        self._steps: list[Callable[[], object]] = []

    def __enter__(self) -> GraphRecorder:
        self._begin()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        # What failed may have ended the capture on its side: that this says so too tells nothing.
        with contextlib.suppress(*() if kind is None else (RuntimeError,)):
            self._end()

    def put_between(self, step: Callable[[], object]) -> None:
        """Let `step` run in every replay, after what was captured so far; now it does not."""
        self._end()
        self._steps.append(step)
        self._begin()

    def _begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog) go on calling CUDA during the capture.
        self._graph.capture_begin(
            pool=self._pool.handle, capture_error_mode="thread_local"
        )

    def _end(self) -> None:
        with warnings.catch_warnings():
            # Between two messages there may be nothing.
            warnings.filterwarnings("ignore", ".*CUDA Graph is empty")
            try:
                self._graph.capture_end()
            except RuntimeError:
                self._give_back()
                raise
        self._steps.append(self._graph.replay)

    def _give_back(self) -> None:
        """What torch leaves to a graph that CUDA refuses: the stream's memory, random numbers."""
        device = torch.cuda.current_device()
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device, self._pool.handle)
            torch._C._cuda_releasePool(device, self._pool.handle)
        _capture_one_kernel(torch.cuda.CUDAGraph())

    def replay(self) -> None:
        """Run all of it on the current stream."""
        for step in self._steps:
            step()


def _capture_one_kernel(graph: torch.cuda.CUDAGraph, pool: Any = None) -> None:
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        torch.zeros(1, device="cuda")
