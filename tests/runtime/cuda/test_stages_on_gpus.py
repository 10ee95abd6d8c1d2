"""Stages on two GPUs: their calls are captured with the messages between the graphs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from porter.generate import plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

ROOT = Path(__file__).parents[3]
NAMES = [
    "tests.toys.joint_pipeline:ToyJointPipeline",
    "tests.toys.batched_pipeline:ToyBatchedPipeline",
    "FluxPipeline",
]


def test_captured_calls_of_stages(tmp_path: Path) -> None:
    plan(NAMES, tmp_path).write(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    script = ["-m", "tests.runtime.cuda.captured_stages", str(tmp_path), *NAMES]
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
