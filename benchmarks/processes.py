"""Starts the processes of a measurement, ends them in time, and reads what they left.

Processes are forked from a server that has imported torch and diffusers but has not touched
a GPU: each measurement has processes of its own, and none pays for the imports.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.worker import Job, run_rank


@dataclass(frozen=True)
class Outcome:
    """A measurement, or why there is none.

    Args:
        result: what the last rank measured, None after a failure.
        error: last line of the first failed rank's log.
        seconds: of the whole process, start and end included.
    """

    result: dict[str, Any] | None
    error: str | None
    seconds: float


class ProcessServer:
    """Runs jobs one after another.

    Args:
        folder: for logs.
        timeout: seconds that a job may take.
    """

    def __init__(self, folder: Path, timeout: float) -> None:
        self._folder = folder
        self._timeout = timeout
        # Asking for GPUs must not start CUDA in the server: forks could not use it.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["diffusers", "benchmarks.preload"])

    def run(self, job: Job) -> Outcome:
        """Run a job to its end or its time limit; no process is left."""
        start = time.monotonic()
        job.result.unlink(missing_ok=True)
        port = _free_port()
        logs = [
            self._folder / f"{job.result.stem}.rank{rank}.log"
            for rank in range(job.layout.num_ranks)
        ]
        processes = [
            self._context.Process(target=run_rank, args=(job, rank, port, log))
            for rank, log in enumerate(logs)
        ]
        for process in processes:
            process.start()
        error = _wait(processes, start + self._timeout)
        if error is None and job.result.is_file():
            result = json.loads(job.result.read_text(encoding="utf-8"))
            return Outcome(result, None, time.monotonic() - start)
        if error is None or error[0] is not None:
            rank = 0 if error is None else error[0]
            message = _last_line(logs[rank or 0])
        else:
            message = f"not done within {self._timeout:.0f} s"
        return Outcome(None, message, time.monotonic() - start)


def _wait(processes: list[Any], deadline: float) -> tuple[int | None] | None:
    """None when all ended well, (rank,) of the first that failed, (None,) at the deadline."""
    try:
        while True:
            codes = [process.exitcode for process in processes]
            failed = [rank for rank, code in enumerate(codes) if code]
            if failed:
                return (failed[0],)
            if all(code == 0 for code in codes):
                return None
            if time.monotonic() > deadline:
                return (None,)
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _last_line(log: Path) -> str:
    """The error that a traceback ends with."""
    text = log.read_text(encoding="utf-8") if log.is_file() else ""
    lines = [line for line in text.splitlines() if line and not line.startswith(" ")]
    errors = [line for line in lines if "Error" in line.split(":")[0]]
    return (errors or lines or ["no output"])[-1][:300]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
