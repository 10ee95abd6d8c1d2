"""Which models a step calls, and which serve the call as a whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from porter.probe.capture import called_each_step


class Scheduler:
    def step(self, output: Any, t: Any, sample: torch.Tensor) -> torch.Tensor:
        return sample


class Pipeline:
    """Text goes through one model before the loop, control through another in it."""

    def __init__(self) -> None:
        from diffusers import ModelMixin

        class Model(ModelMixin):  # type: ignore[misc]
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x

        names = ("connectors", "controlnet", "transformer")
        self.components = {name: Model() for name in names}
        self.scheduler = Scheduler()

    def __call__(self, steps: int) -> None:
        latents, sound = torch.zeros(1, 3), torch.zeros(1, 2)
        further = copy.deepcopy(self.scheduler)
        self.components["connectors"](latents)
        for t in range(steps):
            self.components["controlnet"](latents)
            self.components["transformer"](latents)
            latents = self.scheduler.step(None, t, latents)
            sound = further.step(None, t, sound)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (3, ("controlnet",)),
        # No second step tells: each is taken for one that a step calls.
        (1, ("connectors", "controlnet")),
    ],
)
def test_the_second_step_tells(steps: int, expected: tuple[str, ...]) -> None:
    names = ("connectors", "controlnet")
    assert called_each_step(Pipeline(), {"steps": steps}, names) == expected
