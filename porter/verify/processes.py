"""The ranks of the runtime, reached as a process: a job goes in, latents come back.

Porter never imports the runtime.  The job is a folder: `job.json`, the calls as a torch
file, and a results folder that the replay fills.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from porter.errors import PorterError
from porter.shrink.torchvision_names import provide
from porter.verify.floor import GLOBAL_SEED

_PREPARE = f"{provide.__module__}:{provide.__name__}"


@dataclass(frozen=True)
class RunRequest:
    """One group of ranks.

    Attributes:
        name: unique; letters, digits, dots, dashes.
        world_size: number of ranks.
        arguments: of `xFuserArgs`.
        calls: names of the calls that it makes, in order.
        fault: fault to inject, None for a true run.
        timeout: seconds.
    """

    name: str
    world_size: int
    arguments: Mapping[str, Any]
    calls: tuple[str, ...]
    fault: str | None = None
    timeout: float = 120.0


@dataclass(frozen=True)
class RunResult:
    """What came back from one group of ranks.

    Attributes:
        name: of the run.
        outputs: final latents by call, replicas joined along the batch.
        callback_steps: by call, for each rank, the steps at which its callback was called.
        error: one line if a rank failed, else None.
        traceback: of the first rank that failed.
        reached: whether the injected fault was met at all.
        seconds: wall time.
    """

    name: str
    outputs: Mapping[str, tuple[torch.Tensor, ...]]
    callback_steps: Mapping[str, tuple[list[int] | None, ...]]
    error: str | None
    traceback: str
    reached: bool
    seconds: float


@dataclass
class Replay:
    """A replay process that has been started. Use as a context manager.

    Attributes:
        folder: the job's folder.
        requests: the runs by name.
    """

    folder: Path
    requests: dict[str, RunRequest]
    process: subprocess.Popen[str]
    port: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def describe(self) -> dict[str, Any]:
        """What the replay says of the port before its first run.

        Raises:
            PorterError: the process ended without a word.
        """
        assert self.process.stdout is not None
        if not self.port:
            line = self.process.stdout.readline()
            if not line:
                raise self._failure()
            self.port = json.loads(line)
        return self.port

    def results(self) -> Iterator[RunResult]:
        """The results, as the runs end.

        Raises:
            PorterError: the process ended before the last run did.
        """
        self.describe()
        assert self.process.stdout is not None
        left = set(self.requests)
        for line in self.process.stdout:
            report = json.loads(line)
            left.discard(report["run"])
            yield self._result(report)
        if left:
            raise self._failure()

    def _result(self, report: dict[str, Any]) -> RunResult:
        request = self.requests[report["run"]]
        outputs: dict[str, tuple[torch.Tensor, ...]] = {}
        error = report.get("error")
        if error is None:
            folder = self.folder / "results" / request.name
            replicas = int(request.arguments.get("data_parallel_degree", 1))
            for call in request.calls:
                outputs[call] = _joined(folder, call, replicas)
                if not outputs[call]:
                    error = (
                        f"call {call!r} returned nothing on the last rank of a replica"
                    )
        steps = report.get("callback_steps", [])
        return RunResult(
            name=request.name,
            outputs=outputs,
            callback_steps={c: tuple(s.get(c) for s in steps) for c in request.calls},
            error=error,
            traceback=report.get("traceback", ""),
            reached=bool(report.get("reached")),
            seconds=float(report["seconds"]),
        )

    def _failure(self) -> PorterError:
        code = self.process.wait()
        text = (self.folder / "stderr.txt").read_text().strip()
        return PorterError(
            f"the replay process ended with exit code {code}: {_last_line(text)}",
            expected="a result of every run",
        )


def start_replay(
    folder: Path,
    *,
    port: str,
    pipeline: str,
    checkpoint: Path,
    generated: Path,
    calls: Mapping[str, Mapping[str, Any]],
    runs: Sequence[RunRequest],
    max_ranks: int | None = None,
) -> Replay:
    """Write the job and start the process that runs it.

    Args:
        folder: an empty folder for the job.
        port: name that the pipeline was ported by.
        pipeline: `module:Class` of the upstream pipeline.
        checkpoint: folder of the tiny checkpoint.
        generated: folder of the ports.
        calls: keyword arguments that pickle, by name of the call.
        runs: the runs, in the order in which they start.
        max_ranks: ranks alive at a time; None takes twice the number of cores, because
            small ranks mostly wait for each other.
    """
    torch.save({name: dict(call) for name, call in calls.items()}, folder / "calls.pt")
    (folder / "results").mkdir()
    job = {
        "pipeline": pipeline,
        "checkpoint": str(checkpoint.resolve()),
        "generated": str(generated.resolve()),
        "port": port,
        "seed": GLOBAL_SEED,
        "calls": "calls.pt",
        "results": "results",
        "max_ranks": max_ranks or 2 * _cores(),
        "runs": [vars(run) for run in runs],
        "imports": modules_of_components(checkpoint),
        "prepare": [_PREPARE] if provide() else [],
    }
    (folder / "job.json").write_text(json.dumps(job, indent=1))
    with open(folder / "stderr.txt", "w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "xfuser_runtime.replay", str(folder / "job.json")],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _python_path()},
        )
    return Replay(folder, {run.name: run for run in runs}, process)


def modules_of_components(checkpoint: Path) -> list[str]:
    """Modules outside diffusers and transformers that hold components of a checkpoint."""
    index = json.loads((checkpoint / "model_index.json").read_text())
    # Lists of other lengths are values of the configuration.
    entries = [e for e in index.values() if isinstance(e, list) and len(e) == 2]
    modules = {entry[0] for entry in entries if isinstance(entry[0], str)}
    return sorted(module for module in modules if "." in module)


def _joined(folder: Path, call: str, replicas: int) -> tuple[torch.Tensor, ...]:
    """The outputs of all replicas, joined along the batch; empty where one is missing."""
    paths = [folder / f"{call}.dp{replica}.pt" for replica in range(replicas)]
    if not all(path.exists() for path in paths):
        return ()
    parts = [torch.load(path, weights_only=True) for path in paths]
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def _python_path() -> str:
    """This process's import path: a toy pipeline must import in the replay as it does here."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2


def _last_line(text: str) -> str:
    return text.splitlines()[-1] if text else "no message"
