"""Where a step's time goes on the GPU: kernels by kind, and the time between them.

torchrun --nproc_per_node=2 -m benchmarks.kernels --model flux --mode ulysses2 --compiled
"""

from __future__ import annotations

import argparse
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import engines
from benchmarks.layouts import OURS, Layout, layouts_for
from benchmarks.models import MODELS, build_pipeline, call_arguments
from xfuser_runtime.config import world_size_of_environment

#: Kinds by what the kernels' names hold, first match first.
_KINDS = {
    "attention": r"fmha|flash|sdpa|attention",
    "messages": r"nccl",
    "barriers": r"barrier",
    "matrix products": r"gemm|nvjet|cutlass|cublas|xmma|sm90_.*tn_n|splitK",
    "copies": r"copy|memcpy|CatArray",
    "compiled kernels": r"^triton",
}
#: Steps that are looked at, of a call that takes one more: what comes before the loop is left out.
_STEPS = 3
#: The kernel that ends a step, by what its name holds.
_MARK = "spin_kernel"
#: Microseconds: kernels of one graph follow one another faster.
LONG_GAP = 5


def main(argv: Sequence[str] | None = None) -> None:
    """Profile `_STEPS` steps of a call after warm-up; rank 0 prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels")
    add = parser.add_argument
    add("--model", choices=list(MODELS), default="flux")
    add("--size", type=int, default=1024)
    add("--mode", default="ulysses2", help="as in the tables: one, cfg2, ulysses2, ...")
    add("--compiled", action="store_true")
    add("--generated", default="generated", metavar="DIR")
    add("--longest", type=int, default=10, metavar="N", help="kernels to name")
    args = parser.parse_args(argv)
    layout = _layout(args.model, args.mode, args.compiled)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    model = MODELS[args.model]
    stock = build_pipeline(model, device, tiny=False)
    _mark_steps(stock.scheduler)
    steps = _STEPS + 1
    pipeline = engines.prepare(
        stock, model, layout, generated=args.generated, steps=steps
    )

    def call() -> None:
        arguments = call_arguments(
            model, stock, size=args.size, steps=steps, tiny=False
        )
        with torch.no_grad():
            pipeline(**arguments)
        torch.cuda.synchronize()

    for _ in range(3):
        call()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
    if rank == 0:
        print(f"{args.model} {args.size} {layout.name}")
        print(table(marked(_kernels(profiled.events())), longest=args.longest))


def table(kernels: Sequence[tuple[str, float, float]], *, longest: int = 10) -> str:
    """Milliseconds a step by kind, and the kernels that take longest, with their calls a step.

    Args:
        kernels: name, start and end in microseconds.
        longest: kernels to name.
    """
    by_kind: dict[str, float] = defaultdict(float)
    by_name: dict[str, list[float]] = defaultdict(list)
    for name, start, end in kernels:
        by_kind[kind_of(name)] += end - start
        by_name[name[:80]].append(end - start)
    gaps = gaps_between((start, end) for _, start, end in kernels)
    long = [gap for gap in gaps if gap >= LONG_GAP]
    by_kind["nothing runs"] = sum(gaps)
    by_kind[f"of it in {len(long) / _STEPS:.1f} gaps of {LONG_GAP} us or more"] = sum(
        long
    )
    span = max(end for _, _, end in kernels) - min(start for _, start, _ in kernels)
    lines = ["| part | ms a step |", "| --- | ---: |"]
    lines += [f"| {kind} | {t / 1e3 / _STEPS:.2f} |" for kind, t in by_kind.items()]
    lines.append(f"| from the first kernel to the last | {span / 1e3 / _STEPS:.2f} |")
    named = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:longest]
    lines += [
        f"{sum(times) / 1e3 / _STEPS:8.2f} ms {len(times) / _STEPS:6.1f} x  {name}"
        for name, times in named
    ]
    return "\n".join(lines)


def marked(
    kernels: Sequence[tuple[str, float, float]],
) -> list[tuple[str, float, float]]:
    """The kernels of the last `_STEPS` steps, without the marks.

    Args:
        kernels: name, start and end in microseconds.
    """
    first, *_, last = sorted(start for name, start, _ in kernels if _MARK in name)
    return [x for x in kernels if first < x[1] < last and _MARK not in x[0]]


def kind_of(name: str) -> str:
    """The kind of a kernel; `other` where no pattern fits."""
    for kind, pattern in _KINDS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "other"


def gaps_between(ranges: Iterable[tuple[float, float]]) -> list[float]:
    """Lengths of the gaps in the union of time ranges: kernels of two streams overlap."""
    ordered = sorted(ranges)
    reached = accumulate((end for _, end in ordered), max)
    return [
        start - before
        for before, (start, _) in zip(reached, ordered[1:], strict=False)
        if start > before
    ]


def _mark_steps(scheduler: Any) -> None:
    """Let a kernel of its own end each step."""
    step = scheduler.step

    def marked_step(*args: Any, **kwargs: Any) -> Any:
        found = step(*args, **kwargs)
        torch.cuda._sleep(1)
        return found

    scheduler.step = marked_step


def _kernels(events: Iterable[Any]) -> list[tuple[str, float, float]]:
    return [
        (event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]


def _layout(model: str, mode: str, compiled: bool) -> Layout:
    found = layouts_for(
        MODELS[model],
        world_size_of_environment(),
        has_context_parallel=False,
        has_xfuser=False,
        on_gpu=True,
    )
    for layout in found:
        if (layout.engine, layout.mode, layout.compiled) == (OURS, mode, compiled):
            return layout
    names = ", ".join(dict.fromkeys(x.mode for x in found if x.engine == OURS))
    raise SystemExit(f"error: no layout {mode}, expected one of: {names}")


if __name__ == "__main__":
    main()
