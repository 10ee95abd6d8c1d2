"""Which models of a step are given the latents: two runs with different seeds tell."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ModelMixin

from porter.probe.helpers import models_on_latents


class _Model(ModelMixin):  # type: ignore[misc]
    def forward(self, x: torch.Tensor, extra: Any = None) -> torch.Tensor:
        return x


class _Pipeline:
    """Calls three models; the third sees the latents in the second step alone."""

    def __init__(self) -> None:
        self.components = {name: _Model() for name in ("text", "control", "late")}

    def __call__(self, *, seed: int) -> None:
        latents = torch.randn(2, generator=torch.Generator().manual_seed(seed))
        for step in range(2):
            self.components["text"](torch.ones(2), extra={"step": torch.tensor(step)})
            self.components["control"](torch.ones(2), extra=[latents])
            self.components["late"](latents * step)


def test_models_that_do_not_see_the_latents_are_left_out() -> None:
    names = ("text", "control", "late")
    assert models_on_latents(_Pipeline(), dict, names) == ("control", "late")
    assert models_on_latents(_Pipeline(), dict, ("text",)) == ()
    assert models_on_latents(None, dict, ()) == ()
