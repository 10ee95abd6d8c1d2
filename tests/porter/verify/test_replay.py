"""The replay on its own: jobs that it refuses, calls that travel, ranks that end together."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from porter.verify.cases import CHANGE_LATENTS, Case, cases_for, packed
from porter.verify.processes import modules_of_components
from xfuser_runtime.replay import ranks
from xfuser_runtime.replay.calls import callback_steps, unpacked
from xfuser_runtime.replay.faults import injected
from xfuser_runtime.replay.job import Job, Run, read_job


def _write_job(folder: Path, **changes: Any) -> Path:
    torch.save({"a call": {}}, folder / "calls.pt")
    job: dict[str, Any] = {
        "port": "Pipe",
        "pipeline": "diffusers:DiffusionPipeline",
        "checkpoint": "checkpoint",
        "generated": "generated",
        "calls": "calls.pt",
        "results": "results",
        "runs": [
            {"name": "run", "world_size": 2, "arguments": {}, "calls": ["a call"]}
        ],
    }
    path = folder / "job.json"
    path.write_text(json.dumps({**job, **changes}))
    return path


def test_paths_of_a_job_are_relative_to_it(tmp_path: Path) -> None:
    job = read_job(_write_job(tmp_path))
    assert job.checkpoint == tmp_path / "checkpoint"
    assert job.runs == (Run("run", 2, {}, ("a call",)),)


def test_modules_of_components_are_those_of_other_packages(tmp_path: Path) -> None:
    index = {
        "_class_name": "Pipe",
        "vae": ["diffusers", "AutoencoderKL"],
        "processor": ["my.components", "Processor"],
        "safety_checker": [None, None],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert modules_of_components(tmp_path) == ["my.components"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "colour"),
        (
            {"runs": [{"name": "r", "world_size": 1, "arguments": {}, "calls": ["b"]}]},
            r"makes calls \['b'\], expected calls of the job: a call",
        ),
        ({"runs": [{"name": "r"}]}, "expected the fields"),
    ],
)
def test_bad_jobs_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if "runs" in changes and "calls" not in changes["runs"][0]:
        message = "calls"
    with pytest.raises(ValueError, match=message):
        read_job(_write_job(tmp_path, **changes))


def test_calls_travel_with_generators_and_callbacks(
    pixart: Any, tmp_path: Path
) -> None:
    case = next(c for c in cases_for(pixart) if c.callback == CHANGE_LATENTS)
    path = tmp_path / "call.pt"
    torch.save(packed(case.kwargs(pixart), case.callback), path)
    kwargs = unpacked(torch.load(path, weights_only=False))
    here = case.kwargs(pixart)
    assert torch.equal(pixart(**kwargs).images, pixart(**here).images)
    assert callback_steps(kwargs) == here["callback"].calls == list(range(8))
    assert callback_steps(Case(1, 0, 0, True).kwargs(pixart)) is None


def test_an_unknown_fault_is_refused() -> None:
    with pytest.raises(ValueError, match="gather_dropped"), injected("rain"):
        pass


def _job(tmp_path: Path) -> Job:
    return Job("Pipe", "m:P", tmp_path, tmp_path, {"call": {}}, tmp_path / "out", ())


def _finish(running: ranks.RunningRun) -> dict[str, Any]:
    while True:
        result = running.poll()
        if result is not None:
            return result
        time.sleep(0.01)


class _Port:
    """Stands for a port: `cls(stock, engine_config)`, then calls."""

    def __init__(self, stock: Any, engine_config: Any) -> None:
        self.stock = stock

    def __call__(self) -> Any:
        return self.stock()


def test_ranks_return_what_the_replica_has(tmp_path: Path) -> None:
    def last_rank_answers() -> Any:
        rank = torch.distributed.get_rank()
        return (torch.full((1, 2), 7.0),) if rank == 1 else None

    run = Run("run", 2, {"use_cfg_parallel": True}, ("call",), timeout=60)
    started = ranks.start_run(_job(tmp_path), run, last_rank_answers, _Port)
    result = _finish(started)
    assert "error" not in result
    (stored,) = torch.load(tmp_path / "out" / "run" / "call.dp0.pt")
    assert torch.equal(stored, torch.full((1, 2), 7.0))


def test_two_answers_of_one_replica_are_an_error(tmp_path: Path) -> None:
    def every_rank_answers() -> Any:
        return (torch.ones(1),)

    run = Run("run", 2, {"use_cfg_parallel": True}, ("call",), timeout=60)
    started = ranks.start_run(_job(tmp_path), run, every_rank_answers, _Port)
    assert "FileExistsError" in _finish(started)["error"]


def test_one_failing_rank_ends_all_and_is_named(tmp_path: Path) -> None:
    def second_rank_fails() -> Any:
        if torch.distributed.get_rank() == 1:
            raise ArithmeticError("boom")
        time.sleep(600)

    run = Run("run", 2, {"ulysses_degree": 2}, ("call",), timeout=300)
    started = ranks.start_run(_job(tmp_path), run, second_rank_fails, _Port)
    result = _finish(started)
    assert result["error"] == "rank 1: ArithmeticError: boom"
    assert "second_rank_fails" in result["traceback"]
    assert result["seconds"] < 60
    assert not any(rank.is_alive() for rank in started.ranks)


def test_hanging_ranks_are_ended(tmp_path: Path) -> None:
    run = Run("run", 2, {"ulysses_degree": 2}, ("call",), timeout=5)
    started = ranks.start_run(_job(tmp_path), run, lambda: time.sleep(600), _Port)
    result = _finish(started)
    assert result["error"] == "no answer after 5 s"
    assert not any(rank.is_alive() for rank in started.ranks)
