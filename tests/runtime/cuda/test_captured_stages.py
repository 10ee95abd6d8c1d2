"""Stages: their calls are captured with the messages between the graphs; on CPU that is played."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from porter.generate import plan
from tests.torchrun import check_fine

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
    check_fine("-m", "tests.runtime.cuda.captured_stages", str(folder), *names)
