"""What the exchange of Ulysses costs: attention with it and without, in CUDA graphs.

    torchrun --nproc_per_node=2 -m benchmarks.exchange

Microseconds of one call on the slower rank, for each way to exchange: messages, or copies into
the peers' memory with the heads in parts of these shares, packed first or not. The first column
is attention alone, over the rows and heads that a rank has after the exchange.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from xfuser_runtime.attention import AttentionPlan, parallel_attention
from xfuser_runtime.config import (
    EngineConfig,
    ParallelConfig,
    world_size_of_environment,
)
from xfuser_runtime.cuda import symmetric
from xfuser_runtime.cuda.peer_memory import is_usable
from xfuser_runtime.cuda.ways import WAYS, different
from xfuser_runtime.distributed import get_runtime_state, get_world_group
from xfuser_runtime.distributed.collectives import all_reduce_max
from xfuser_runtime.distributed.launch import prepare_environment
from xfuser_runtime.distributed.layout import Segment, TokenLayout
from xfuser_runtime.distributed.parallel_state import get_ulysses_group

#: Samples, tokens, heads, channels of a head.
CASES: dict[str, tuple[int, int, int, int]] = {
    "flux 1024": (1, 4608, 24, 128),
    "flux 2048": (1, 16896, 24, 128),
    "sd3 1024": (2, 4429, 24, 64),
    "pixart 1024": (2, 4096, 16, 72),
}
#: Calls in a graph, replays that are timed.
_CALLS, _REPLAYS = 8, 20


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all cases; rank 0 prints a table and writes `--json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exchange")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args(argv)
    prepare_environment(
        EngineConfig(ParallelConfig(ulysses_degree=world_size_of_environment()))
    )
    found = {case: measure(shape) for case, shape in CASES.items()}
    if get_world_group().rank_in_group == 0:
        print(markdown(found), flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


def measure(shape: tuple[int, int, int, int]) -> dict[str, float]:
    """Microseconds of a call by the way to exchange.

    Raises:
        AssertionError: a way whose result is not that of attention over all rows.
    """
    batch, rows, heads, channels = shape
    group, state = get_ulysses_group(), get_runtime_state()
    generator = torch.Generator("cuda").manual_seed(0)
    whole = [
        torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        for _ in range(3)
    ]
    expected = _attention(*whole)
    layout = TokenLayout((Segment("tokens", rows),), 1, group.world_size)
    plan = AttentionPlan(layout, ("tokens",), ("tokens",))
    ((start, stop),) = layout.ranges("tokens", None, group.rank_in_group)
    own = [x[:, start:stop].contiguous() for x in whole]
    local = heads // group.world_size
    found = {"alone": _time(lambda: _attention(*(x[:, :, :local] for x in whole)))}

    def call() -> torch.Tensor:
        return parallel_attention(*own, plan=plan)

    def check_and_time(name: str) -> None:
        error = (call() - expected[:, start:stop]).float().norm()
        assert error <= 1e-2 * expected.float().norm(), f"{name}: {shape}"
        found[name] = _time(call)

    state.has_symmetric_memory = False
    check_and_time("messages")
    state.has_symmetric_memory = is_usable(group)
    for way in different(WAYS, local) if state.has_symmetric_memory else ():
        symmetric.WAY = way
        check_and_time(way.name)
    symmetric.WAY = None
    return found


def markdown(found: dict[str, dict[str, float]]) -> str:
    """A table with a row for each case."""
    names = list(dict.fromkeys(name for times in found.values() for name in times))
    lines = ["| case | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    lines += [
        f"| {case} | "
        + " | ".join(f"{times[n]:.0f}" if n in times else "" for n in names)
        + " |"
        for case, times in found.items()
    ]
    return "\n".join(lines)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    return out.transpose(1, 2)


def _time(call: Callable[[], Any]) -> float:
    """Microseconds of a call in a graph, on the slower rank."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(_CALLS):
            call()
    graph.replay()
    times = []
    for _ in range(_REPLAYS):
        torch.distributed.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / _CALLS)
    own = torch.tensor(statistics.median(times), device="cuda")
    return float(all_reduce_max(own, get_world_group()))


if __name__ == "__main__":
    main()
