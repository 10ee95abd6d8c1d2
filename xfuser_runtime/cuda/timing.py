"""Times of calls as they run later: in a CUDA graph, without what the host costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

#: Calls in a graph, and replays of it.
_CALLS, _REPLAYS = 4, 5


def seconds_in_graph(
    run: Callable[[], Any], before: Callable[[], Any] = lambda: None
) -> float:
    """The median time of a call on CUDA, in seconds.

    Args:
        run: the call, which has run before.
        before: called before each replay.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(_CALLS):
            run()
    times = []
    for _ in range(_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / _CALLS)
    return statistics.median(times)


def agrees(found: torch.Tensor, expected: torch.Tensor, rounding: float = 1e-2) -> bool:
    """Whether two results are equal but for the rounding of other kernels, in relative L2."""
    error = (found - expected).float().norm()
    return bool(error <= rounding * expected.float().norm())
