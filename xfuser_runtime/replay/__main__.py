"""`python -m xfuser_runtime.replay JOB.json`: run a job, one JSON line a finished run.

The first line describes the port; then one line a run, in the order in which they end:
`{"run": name, "seconds": s, "callback_steps": [...]}`, with `error` where a rank failed.
What the ranks returned lies in the job's results folder as `<run>/<call>.dp<replica>.pt`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from xfuser_runtime.loader import load_pipeline_class
from xfuser_runtime.pipelines.components import modules_of
from xfuser_runtime.replay.job import Job, Run, read_job
from xfuser_runtime.replay.ranks import RunningRun, start_run
from xfuser_runtime.transformers.register import xFuserTransformerWrappersRegister


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the job, load everything once, run all runs. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m xfuser_runtime.replay",
        description="Run calls of a port on forked gloo ranks and store what they return.",
    )
    parser.add_argument("job", type=Path, metavar="JOB.json")
    job = read_job(parser.parse_args(arguments).job)
    # Ranks are forked: a thread pool that started here would be dead in them.
    torch.set_num_threads(1)
    job.make_ready()
    port_class = load_pipeline_class(job.port, generated=job.generated)
    stock: Any = job.pipeline_class.from_pretrained(job.checkpoint)  # type: ignore[attr-defined]
    stock.set_progress_bar_config(disable=True)
    _say({"port": port_class.__name__, "block_loops": _block_loops(stock)})
    _run_all(job, stock, port_class)
    return 0


def _run_all(job: Job, stock: Any, port_class: Any) -> None:
    """Keep up to `job.max_ranks` ranks alive until all runs have ended."""
    waiting = list(job.runs)
    alive: list[RunningRun] = []
    try:
        while waiting or alive:
            while waiting and _fits(waiting[0], alive, job.max_ranks):
                alive.append(start_run(job, waiting.pop(0), stock, port_class))
            for running in list(alive):
                result = running.poll()
                if result is not None:
                    alive.remove(running)
                    _say(result)
            time.sleep(0.01)
    finally:
        for running in alive:
            running.end()


def _fits(run: Run, alive: Sequence[RunningRun], max_ranks: int) -> bool:
    ranks = sum(running.run.world_size for running in alive)
    return not alive or ranks + run.world_size <= max_ranks


def _block_loops(stock: Any) -> dict[str, list[str]]:
    """The block lists that the ports of the pipeline's denoisers run as regions."""
    found = {}
    for name, module in modules_of(stock).items():
        wrapper = xFuserTransformerWrappersRegister.find(type(module))
        if wrapper is not None:
            found[name] = list(wrapper.block_loops)  # type: ignore[attr-defined]
    return found


def _say(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    sys.exit(main())
