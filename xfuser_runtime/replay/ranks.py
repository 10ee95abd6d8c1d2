"""The ranks of one run: forked from the warm process, watched, and ended together.

The parent has imported everything and loaded the checkpoint, so a rank costs one fork.
Each rank has one thread, gloo, and a store in a file: no port, no environment.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import time
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from xfuser_runtime.args import xFuserArgs
from xfuser_runtime.distributed import parallel_state
from xfuser_runtime.replay.calls import callback_steps, output_tensors, unpacked
from xfuser_runtime.replay.faults import injected
from xfuser_runtime.replay.job import Job, Run

#: Seconds that the other ranks get to end by themselves once one has failed.
GRACE = 2.0


@dataclass
class RunningRun:
    """A run whose ranks are alive."""

    run: Run
    folder: Path
    ranks: list[BaseProcess]
    started: float = field(default_factory=time.monotonic)
    failed_at: float | None = None
    timed_out: bool = False

    def poll(self) -> dict[str, Any] | None:
        """Watch the ranks; the result once all have ended, else None."""
        now = time.monotonic()
        failed = any(rank.exitcode not in (None, 0) for rank in self.ranks)
        if failed and self.failed_at is None:
            self.failed_at = now
        self.timed_out |= now - self.started > self.run.timeout
        given_up = self.failed_at is not None and now - self.failed_at > GRACE
        if self.timed_out or given_up:
            self.end()
        if any(rank.is_alive() for rank in self.ranks):
            return None
        return self._result(now - self.started)

    def end(self) -> None:
        """End the ranks that still live."""
        for rank in self.ranks:
            if rank.is_alive():
                rank.kill()
        for rank in self.ranks:
            rank.join()

    def _result(self, seconds: float) -> dict[str, Any]:
        reports = [_read(self.folder / f"rank{r}.json") for r in range(len(self.ranks))]
        errors = [report for report in reports if report and report.get("error")]
        result: dict[str, Any] = {
            "run": self.run.name,
            "seconds": round(seconds, 3),
            "reached": any(report and report.get("reached") for report in reports),
        }
        if errors:
            first = min(errors, key=lambda report: report["time"])
            result["error"] = f"rank {first['rank']}: {first['error']}"
            result["traceback"] = first["traceback"]
        elif self.timed_out:
            result["error"] = f"no answer after {self.run.timeout:.0f} s"
        elif any(rank.exitcode for rank in self.ranks):
            codes = [rank.exitcode for rank in self.ranks]
            result["error"] = f"the ranks ended with exit codes {codes}"
        else:
            result["callback_steps"] = [report["callback_steps"] for report in reports]
        return result


def start_run(job: Job, run: Run, stock: Any, port_class: Any) -> RunningRun:
    """Fork the ranks of `run`; its results go to a folder of its name."""
    folder = job.results / run.name
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    ranks: list[BaseProcess] = [
        context.Process(
            target=_rank_main, args=(job, run, stock, port_class, folder, rank)
        )
        for rank in range(run.world_size)
    ]
    for process in ranks:
        process.start()
    return RunningRun(run, folder, ranks)


def _rank_main(
    job: Job, run: Run, stock: Any, port_class: Any, folder: Path, rank: int
) -> None:
    """One rank, from fork to exit. Never returns: the parent's cleanup is not its own."""
    report: dict[str, Any] = {"rank": rank, "callback_steps": {}}
    code = 0
    with open(folder / f"rank{rank}.log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            _run_calls(job, run, stock, port_class, folder, rank, report)
        except BaseException as error:
            code = 1
            report["error"] = f"{type(error).__name__}: {error}"
            report["traceback"] = traceback.format_exc()
    report["time"] = time.time()
    part = folder / f"rank{rank}.part"
    part.write_text(json.dumps(report))
    part.replace(folder / f"rank{rank}.json")
    os._exit(code)


def _run_calls(
    job: Job,
    run: Run,
    stock: Any,
    port_class: Any,
    folder: Path,
    rank: int,
    report: dict[str, Any],
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(run.world_size)}
    parallel_state.init_distributed_environment(
        rank=rank,
        world_size=run.world_size,
        backend="gloo",
        init_method=f"file://{folder / 'store'}",
        timeout=timedelta(seconds=run.timeout),
    )
    engine_config, _ = xFuserArgs(**run.arguments).create_config()
    pipeline = port_class(stock, engine_config)
    with contextlib.ExitStack() as stack:
        fault = stack.enter_context(injected(run.fault)) if run.fault else None
        for name in run.calls:
            kwargs = unpacked(job.calls[name])
            torch.manual_seed(job.seed)
            output = pipeline(**kwargs)
            report["callback_steps"][name] = callback_steps(kwargs)
            if output is not None:
                _store(output_tensors(output), folder, name)
        report["reached"] = fault is not None and fault.reached
    # A rank that exits while another still receives from it would break the connection.
    torch.distributed.barrier()


def _store(tensors: list[torch.Tensor], folder: Path, call: str) -> None:
    """Keep what this rank returned, under the number of its data-parallel replica."""
    path = folder / f"{call}.dp{parallel_state.get_data_parallel_rank()}.pt"
    with open(path, "xb") as file:  # a second rank of the replica must not return
        torch.save(tensors, file)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    report: dict[str, Any] = json.loads(path.read_text())
    return report
