"""Tiny checkpoints, made once a session."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from porter.shrink import make_checkpoint
from tests.toys.batched_pipeline import ToyBatchedPipeline
from tests.toys.joint_pipeline import ToyJointPipeline


@pytest.fixture(scope="session")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A stock PixArt pipeline: batched guidance, cross-attention to masked text."""
    return _stock(diffusers.PixArtAlphaPipeline, tmp_path_factory)


@pytest.fixture(scope="session")
def joint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A toy: joint attention with a key mask, packed latents, rope, two calls a step."""
    return _stock(ToyJointPipeline, tmp_path_factory)


@pytest.fixture(scope="session")
def batched(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A toy: batched guidance that the cut-off callback can switch off."""
    return _stock(ToyBatchedPipeline, tmp_path_factory)


def _stock(pipeline_class: Any, factory: pytest.TempPathFactory) -> Any:
    torch.set_num_threads(1)
    folder = factory.mktemp(pipeline_class.__name__)
    make_checkpoint(pipeline_class, folder)
    pipeline = pipeline_class.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
