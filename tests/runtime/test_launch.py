"""One rank that fails ends all ranks, soon, and says who it was and where."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, run_ranks
from tests.torchrun import torchrun
from xfuser_runtime.config import EngineConfig, ParallelConfig
from xfuser_runtime.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    destroy_runtime_state,
    get_pipeline_parallel_world_size,
    get_runtime_state,
    init_distributed_environment,
)
from xfuser_runtime.distributed.launch import fail_together, prepare_environment
from xfuser_runtime.errors import ConfigError

ROOT = Path(__file__).parents[2]


def _in_step(rank: int, folder: Path, action: Callable[[int], Any]) -> None:
    """Run ``action(rank)`` at step 3 of 8 of a job of stages; what is printed goes to a file."""
    sys.stderr = (folder / f"rank{rank}").open("w")
    with fail_together():
        stages = ParallelConfig(pipefusion_parallel_degree=dist.get_world_size())
        prepare_environment(EngineConfig(stages))
        state = get_runtime_state()
        state.set_input_parameters(num_inference_steps=8)
        state.start_pass(step=3, patch=None)
        action(rank)


def _printed(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("rank*"))]


def _end_of(
    action: Callable[[int], Any], folder: Path, world_size: int = 3
) -> tuple[dict[int, str], list[str], float]:
    """How each rank ended, what it printed, and the seconds until the last one had."""
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(_in_step, world_size, folder, action, timeout=120, grace=60)
    return caught.value.failures, _printed(folder), time.monotonic() - start


def _wait_for_all() -> None:
    dist.all_reduce(torch.zeros(1))


def _wait_outside_of_a_collective() -> None:
    time.sleep(100)


@pytest.mark.parametrize("wait", [_wait_for_all, _wait_outside_of_a_collective])
def test_a_rank_that_raises_ends_all(tmp_path: Path, wait: Callable[[], None]) -> None:
    def action(rank: int) -> None:
        if rank == 1:
            time.sleep(1.5)
            raise ValueError("a bad size\nand more")
        wait()

    failures, printed, seconds = _end_of(action, tmp_path)
    assert failures == dict.fromkeys(range(3), "died with exit code 1")
    message = "error: rank 1 (stage 1 of 3, step 3 of 8): ValueError: a bad size\n"
    assert printed[1] == message
    # A rank whose collective broke shows where it stood, but the failure told is the first one.
    assert all("error:" not in text for text in (printed[0], printed[2]))
    assert seconds < 30


def test_an_error_of_ours_has_no_class_name_and_a_bug_has_its_traceback(
    tmp_path: Path,
) -> None:
    def action(rank: int) -> None:
        if rank == 0:
            raise ConfigError("a, expected b; do c")
        _wait_outside_of_a_collective()

    _, printed, _ = _end_of(action, tmp_path, 2)
    assert printed == [
        "error: rank 0 (stage 0 of 2, step 3 of 8): a, expected b; do c\n",
        "",
    ]

    def bug(rank: int) -> None:
        if rank == 0:
            raise KeyError("no such key")
        _wait_outside_of_a_collective()

    _, printed, _ = _end_of(bug, tmp_path, 2)
    assert printed[0].startswith("Traceback")
    assert printed[0].endswith(
        "error: rank 0 (stage 0 of 2, step 3 of 8): KeyError: 'no such key'\n"
    )


@pytest.mark.parametrize("wait", [_wait_for_all, _wait_outside_of_a_collective])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_is_killed_is_missed(
    tmp_path: Path, victim: int, wait: Callable[[], None]
) -> None:
    def action(rank: int) -> None:
        if rank == victim:
            time.sleep(2.5)
            os.kill(os.getpid(), signal.SIGKILL)
        wait()

    failures, printed, seconds = _end_of(action, tmp_path)
    expected = dict.fromkeys(range(3), "died with exit code 1")
    assert failures == expected | {victim: "died with exit code -9"}
    told = [text for text in printed if "error:" in text]
    assert len(told) == 1
    assert (
        f"error: rank {victim} (last seen in stage {victim} of 3, step 3 of 8): died"
        in told[0]
    )
    assert seconds < 40


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_the_rank_that_hosts_the_store(tmp_path: Path, how: str) -> None:
    """Without torchrun's store, rank 0 takes the store with it when it ends."""

    def action(rank: int) -> None:
        if rank == 0:
            time.sleep(2.5)
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("boom")
        _wait_outside_of_a_collective()

    port = 20000 + os.getpid() % 20000

    def over_tcp(rank: int) -> None:
        dist.barrier()
        destroy_distributed_environment()
        init_distributed_environment(rank, 2, "gloo", f"tcp://127.0.0.1:{port}")
        _in_step(rank, tmp_path, action)

    with pytest.raises(RankError) as caught:
        run_ranks(over_tcp, 2, timeout=120, grace=60)
    assert caught.value.failures[1] == "died with exit code 1"
    assert sum("error: rank 0" in text for text in _printed(tmp_path)) == 1


def test_a_rank_that_exits_with_a_code_ends_all_with_it_told(tmp_path: Path) -> None:
    def action(rank: int) -> None:
        if rank == 1:
            sys.exit(3)
        _wait_outside_of_a_collective()

    failures, printed, _ = _end_of(action, tmp_path, 2)
    assert failures == {0: "died with exit code 1", 1: "died with exit code 3"}
    assert printed[1].endswith("ended with 3\n")


def test_ranks_that_end_at_different_times_are_not_missed(tmp_path: Path) -> None:
    def slow(rank: int) -> None:
        if rank == 0:
            return
        time.sleep(3)

    assert run_ranks(_in_step, 2, tmp_path, slow) == [None, None]
    assert _printed(tmp_path) == ["", ""]

    def gone_early(rank: int) -> int:
        sys.stderr = (tmp_path / f"rank{rank}").open("w")
        if rank == 1:
            with fail_together():
                pass
            os._exit(0)
        with fail_together():
            time.sleep(3)
        os._exit(0)

    with pytest.raises(RankError) as caught:
        run_ranks(gone_early, 2, grace=20)
    assert caught.value.failures == dict.fromkeys(range(2), "died with exit code 0")
    assert _printed(tmp_path) == ["", ""]


def test_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import os, time, torch.distributed as dist, torch\n"
        "from xfuser_runtime.config import EngineConfig, ParallelConfig\n"
        "from xfuser_runtime.distributed.launch import fail_together, prepare_environment\n"
        "with fail_together():\n"
        "    prepare_environment(EngineConfig(ParallelConfig(ulysses_degree=2)))\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise ValueError('boom')\n"
        "    dist.all_reduce(torch.zeros(1))\n"
    )
    start = time.monotonic()
    done = torchrun(str(script), timeout=120)
    assert done.returncode != 0
    assert (
        "error: rank 1 (stage 0 of 1, outside the denoising loop): ValueError: boom"
        in done.stderr
    )
    assert time.monotonic() - start < 60


def test_one_process_prints_and_ends_alike(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from xfuser_runtime.distributed.launch import fail_together\n"
            "with fail_together():\n    raise ValueError('boom')",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1
    assert (
        done.stderr
        == "error: rank 0 (stage 0 of 1, outside the denoising loop): ValueError: boom\n"
    )


def test_a_second_pipeline_of_other_degrees_is_refused() -> None:
    def second(rank: int) -> str:
        prepare_environment(EngineConfig(ParallelConfig(ulysses_degree=2)))
        prepare_environment(EngineConfig(ParallelConfig(ulysses_degree=2)))
        with pytest.raises(ConfigError, match="expected the same degrees") as caught:
            prepare_environment(EngineConfig(ParallelConfig(ring_degree=2)))
        return str(caught.value)

    run_ranks(second, 2)


def test_prepare_environment_in_one_process() -> None:
    try:
        prepare_environment(EngineConfig(world_size=1))
        assert get_pipeline_parallel_world_size() == 1
        assert get_runtime_state().engine_config == EngineConfig(world_size=1)
    finally:
        destroy_model_parallel()
        destroy_runtime_state()
