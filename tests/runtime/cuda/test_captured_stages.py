"""Stages: their calls are captured with the messages between the graphs; on CPU that is played."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from porter.generate import plan

ROOT = Path(__file__).parents[3]
TOYS = [
    "tests.toys.joint_pipeline:ToyJointPipeline",
    "tests.toys.batched_pipeline:ToyBatchedPipeline",
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA is meant")
def test_played_calls_of_stages(tmp_path: Path) -> None:
    _check(tmp_path, TOYS)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_captured_calls_of_stages(tmp_path: Path) -> None:
    _check(tmp_path, [*TOYS, "FluxPipeline"])


def _check(folder: Path, names: list[str]) -> None:
    plan(names, folder).write(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    script = ["-m", "tests.runtime.cuda.captured_stages", str(folder), *names]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    found = subprocess.run(
        [*command, *script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-4000:]
    assert found.stdout.split().count("fine") == 2
