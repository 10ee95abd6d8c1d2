"""One rank of one measurement: build, warm up, time, hand back the latents."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import engines
from benchmarks.layouts import Layout
from benchmarks.models import MODELS, build_pipeline, call_arguments
from xfuser_runtime.distributed import get_runtime_state


@dataclass(frozen=True)
class Job:
    """A measurement, as it goes to the processes.

    Args:
        model: name of the model.
        layout: what runs it.
        size: pixels of each side.
        steps: denoising steps of a call.
        short_steps: steps of the short call; the difference of both is the time of steps.
        repeats: timed calls of each length.
        tiny: tiny model.
        device: `cuda` or `cpu`.
        generated: folder of our ports.
        result: file for the result of the last rank.
        latents: file for its latents.
        other_size: pixels of two further calls at the end, None for none.
    """

    model: str
    layout: Layout
    size: int
    steps: int
    short_steps: int
    repeats: int
    tiny: bool
    device: str
    generated: str
    result: Path
    latents: Path
    other_size: int | None = None


def run_rank(job: Job, rank: int, port: int, log: Path) -> None:
    """Entry of a process: exit code 0 and a result file, or 1 and a traceback in `log`."""
    _enter(job.layout, rank, port, log)
    try:
        measurement = _measure(job, rank)
        if rank == job.layout.num_ranks - 1:
            job.result.write_text(json.dumps(measurement), encoding="utf-8")
    except BaseException:
        traceback.print_exc()
        code = 1
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    # Past destructors: a communicator that waits for a failed peer must not hold this up.
    os._exit(code)


def _enter(layout: Layout, rank: int, port: int, log: Path) -> None:
    """What torchrun would set, and the output of the process into a file."""
    stream = log.open("w", encoding="utf-8")
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(layout.num_ranks),
        LOCAL_WORLD_SIZE=str(layout.num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        **layout.environment,
    )


def _measure(job: Job, rank: int) -> dict[str, Any]:
    device = torch.device(job.device)
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    model = MODELS[job.model]
    stock = build_pipeline(model, device, tiny=job.tiny, precise=job.layout.precise)
    pipeline = engines.prepare(
        stock, model, job.layout, generated=job.generated, steps=job.steps
    )
    transformer = stock.transformer

    def call(steps: int, size: int = job.size) -> torch.Tensor | None:
        arguments = call_arguments(model, stock, size=size, steps=steps, tiny=job.tiny)
        with torch.no_grad():
            output = pipeline(**arguments)
        return None if output is None else output[0]

    clock = _Clock(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first, _ = clock.time(lambda: call(job.short_steps))
    second, _ = clock.time(lambda: call(job.short_steps))
    # Each patch has one pass of its own in a short call, and the third of them is captured.
    call(job.short_steps)
    # What the warm-up made stays: no collection among the timed calls goes through it again.
    gc.collect()
    gc.freeze()
    short, long = [], []
    latents = None
    for _ in range(job.repeats):
        short.append(clock.time(lambda: call(job.short_steps))[0])
        seconds, latents = clock.time(lambda: call(job.steps))
        long.append(seconds)
    if latents is not None:
        torch.save(latents.float().cpu(), job.latents)
    peak = _peak_of_all_ranks(device)
    other = [
        clock.time(lambda size=size: call(job.short_steps, size))[0]
        for size in [job.other_size] * 2
        if size is not None
    ]
    return {
        "first_call_s": first,
        "second_call_s": second,
        "short_calls_s": short,
        "long_calls_s": long,
        "peak_bytes": peak,
        "other_size_s": other,
        **_of_all_ranks(_replays(transformer)),
    }


def _peak_of_all_ranks(device: torch.device) -> int:
    """Most bytes that any rank had allocated during the calls; 0 on CPU."""
    if device.type != "cuda":
        return 0
    peak = torch.tensor(torch.cuda.max_memory_allocated(device), device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    return int(peak)


class _Clock:
    """Wall time of a call up to the end of the device's work on every rank."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def time(self, call: Callable[[], Any]) -> tuple[float, Any]:
        self._wait(together=True)
        start = time.perf_counter()
        result = call()
        self._wait(together=True)
        return time.perf_counter() - start, result

    def _wait(self, *, together: bool) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if together and torch.distributed.is_initialized():
            torch.distributed.barrier()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)


def _replays(transformer: Any) -> dict[str, Any]:
    """What our runtime captured, why it did not, how heads travel and what attends, by shape."""
    with contextlib.suppress(KeyError, AttributeError):
        replayer = vars(transformer)["_xfuser_wrapping"].replayer
        held = get_runtime_state().workspaces
        ways = {k[1:6]: way.name for k, way in held.items() if k[0] == "way"}
        # The shapes of query and key: (samples, rows, heads, channels).
        kernels = {
            k[1:4]: is_faster for k, is_faster in held.items() if k[0] == "attention"
        }
        return {
            "replays": replayer.replays,
            "capture_s": replayer.capture_seconds,
            "not_captured": replayer.reasons,
            "heads_travel": [f"{list(shape)}: {name}" for shape, name in ways.items()],
            "attention": [
                f"{list(query)} by {key[1]} keys: {name if is_faster else 'torch'}"
                for (name, query, key), is_faster in kernels.items()
            ],
        }
    return {}


def _of_all_ranks(own: dict[str, Any]) -> dict[str, Any]:
    """This rank's report with the reasons of all: each captures for itself."""
    if not own or not torch.distributed.is_initialized():
        return own
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    return own | {
        "replays": [report["replays"] for report in found],
        "not_captured": [
            f"rank {rank}: {reason}"
            for rank, report in enumerate(found)
            for reason in report["not_captured"]
        ],
    }
