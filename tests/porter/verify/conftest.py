"""Tiny checkpoints, made once a session."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from porter.shrink import make_checkpoint


@pytest.fixture(scope="session")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A stock PixArt pipeline: batched guidance, cross-attention to masked text."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pixart")
    make_checkpoint(diffusers.PixArtAlphaPipeline, folder)
    pipeline = diffusers.PixArtAlphaPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
