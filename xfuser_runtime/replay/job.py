"""What a replay is asked to do: a JSON file beside a file of pickled calls."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Run:
    """Calls that one group of ranks makes, one after the other, with one pipeline.

    Attributes:
        name: unique in the job; results are stored under it.
        world_size: number of ranks.
        arguments: keyword arguments of `xFuserArgs`.
        calls: names of the calls, in order.
        fault: a name of `xfuser_runtime.replay.faults.FAULTS` to inject, or None.
        timeout: seconds after which all ranks of the run are ended.
    """

    name: str
    world_size: int
    arguments: dict[str, Any]
    calls: tuple[str, ...]
    fault: str | None = None
    timeout: float = 120.0


@dataclass(frozen=True)
class Job:
    """All runs, and what they share.

    Attributes:
        port: name that the pipeline was ported by.
        pipeline: `module:Class` of the upstream pipeline.
        checkpoint: folder that upstream's `from_pretrained` loads.
        generated: folder of the ports.
        calls: keyword arguments by call, as `calls.unpacked` reads them.
        results: folder for what the ranks return.
        runs: the runs.
        max_ranks: ranks alive at any time; a larger run runs alone.
        seed: of torch's global generator before each call.
        imports: modules that hold components of the checkpoint; upstream's loader takes
            classes of packages other than its own only from modules already imported.
        prepare: functions `module:name` to call once upstream's class is imported and
            before the port is: they bind what upstream's modules lack on this machine.
    """

    port: str
    pipeline: str
    checkpoint: Path
    generated: Path
    calls: dict[str, dict[str, Any]]
    results: Path
    runs: tuple[Run, ...]
    max_ranks: int = 2
    seed: int = 0
    imports: tuple[str, ...] = ()
    prepare: tuple[str, ...] = ()

    @property
    def pipeline_class(self) -> type:
        """The upstream class, imported."""
        found: type = _named(self.pipeline)
        return found

    def make_ready(self) -> None:
        """Import upstream's class and what its components are of; call `prepare`."""
        _named(self.pipeline)
        for module in self.imports:
            importlib.import_module(module)
        for name in self.prepare:
            _named(name)()


def _named(reference: str) -> Any:
    """What `module:name` stands for."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def read_job(path: Path) -> Job:
    """Read a job file; paths in it are relative to its folder.

    Raises:
        ValueError: a run names a call that the job lacks, or a field is unknown.
    """
    fields = json.loads(path.read_text())
    folder = path.parent
    calls = torch.load(folder / fields.pop("calls"), weights_only=False)
    try:
        runs = tuple(
            Run(**{**run, "calls": tuple(run["calls"])}) for run in fields.pop("runs")
        )
        for name in ("checkpoint", "generated", "results"):
            fields[name] = folder / fields[name]
        job = Job(calls=calls, runs=runs, **fields)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path.name}: {error}, expected the fields of Job and Run"
        ) from None
    for run in job.runs:
        missing = set(run.calls) - set(calls)
        if missing:
            raise ValueError(
                f"run {run.name!r} makes calls {sorted(missing)}, expected calls of the "
                f"job: {', '.join(calls)}"
            )
    return job
