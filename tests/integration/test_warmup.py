"""More synchronous steps bring PipeFusion closer to stock."""

from __future__ import annotations

from statistics import mean
from typing import Any

import pytest
import torch

from tests.integration.workshop import (
    JOINT,
    PIXART,
    Workshop,
    arguments,
    distance,
    latents,
    only,
)

STEPS = 8
SEEDS = range(5)


def runs(pipe: Any) -> list[torch.Tensor] | None:
    """Final latents for each seed; None on a rank without output."""
    made = [
        pipe(**arguments(pipe, seed=seed, num_inference_steps=STEPS)) for seed in SEEDS
    ]
    return None if made[0] is None else [latents(output) for output in made]


@pytest.mark.parametrize("name", [PIXART, JOINT])
def test_distance_to_stock_falls_with_the_warmup(workshop: Workshop, name: str) -> None:
    """The mean over five seeds: one warm-up step, half of the steps, all steps."""
    expected = runs(workshop.stock(name))
    assert expected is not None
    means = []
    for warmup in (1, STEPS // 2, STEPS):
        mode = {
            "pipefusion_parallel_degree": 2,
            "num_pipeline_patch": 2,
            "warmup_steps": warmup,
        }
        found = only(workshop.run(name, mode, lambda rank, pipe: runs(pipe)))
        means.append(mean(map(distance, found, expected)))
    one, half, every = means
    assert every < 1e-5 < half < one
