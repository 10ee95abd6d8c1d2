"""Which axes guidance doubles, and at which scale a class stops to guide."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from porter.probe.guidance import measure_guidance
from porter.shrink.kwargs import _guides_at_one


class Scheduler:
    def step(self, output: Any, t: Any, sample: torch.Tensor) -> None:
        raise AssertionError("the probe stops before")


class Pipeline:
    """Calls its transformer as one style of guidance does."""

    def __init__(self, style: str) -> None:
        from diffusers import ModelMixin

        class Transformer(ModelMixin):  # type: ignore[misc]
            def forward(
                self, x: Any, ids: Any = None, scale: Any = None, control: Any = None
            ) -> None: ...

        self.style = style
        self.scheduler = Scheduler()
        self.components = {"transformer": Transformer()}

    def __call__(self, batch: int, guided: bool) -> None:
        transformer, latents = self.components["transformer"], torch.zeros(batch, 3)
        twice = 2 if guided or self.style == "always" else 1
        x: Any = torch.zeros(batch * twice, 3)
        control = None
        if self.style in ("lists", "lists and tokens"):
            x = list(x)
        if "tokens" in self.style:
            control = {0: torch.zeros(batch * twice, 5, 3)}
        ids = torch.zeros(4, 2)  # four positions, for any batch
        if self.style in ("two calls", "two calls always"):
            for _ in range(2 if guided or "always" in self.style else 1):
                transformer(latents, ids)
        else:
            scale = {"of": torch.zeros(2, batch * twice)}
            transformer(x, ids, scale=scale, control=control)
        if self.style == "further calls":
            transformer(latents, ids)
            transformer(latents, ids)
        self.scheduler.step(None, 0, latents)


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("one call", ("batched", {"x": 0, "scale.of": 1})),
        ("lists", ("batched", {"x": "items", "scale.of": 1})),
        ("lists and tokens", ("padded", {})),
        ("tokens", ("batched", {"x": 0, "scale.of": 1, "control.0": 0})),
        ("always", ("batched", {"x": 0, "scale.of": 1})),
        ("further calls", ("batched", {"x": 0, "scale.of": 1})),
        ("two calls", ("sequential", {})),
        ("two calls always", ("sequential", {})),
    ],
)
def test_styles(style: str, expected: Any) -> None:
    def kwargs_of(*, batch_size: int, guidance: bool) -> dict[str, Any]:
        return {"batch": batch_size, "guided": guidance}

    assert measure_guidance(Pipeline(style), kwargs_of) == expected


def test_a_pipeline_of_one_prompt_is_asked_for_one() -> None:
    def kwargs_of(*, batch_size: int, guidance: bool) -> dict[str, Any]:
        return {"batch": 1, "guided": guidance}

    expected = ("batched", {"x": 0, "scale.of": 1})
    assert measure_guidance(Pipeline("one call"), kwargs_of) == ("none", {})
    assert measure_guidance(Pipeline("one call"), kwargs_of, (1,)) == expected


def test_nothing_doubled_is_no_guidance() -> None:
    def kwargs_of(*, batch_size: int, guidance: bool) -> dict[str, Any]:
        return {"batch": batch_size, "guided": False}

    assert measure_guidance(Pipeline("one call"), kwargs_of) == ("none", {})


@pytest.mark.parametrize(("bound", "expected"), [(0, True), (1, False)])
def test_the_class_says_where_guidance_begins(bound: int, expected: bool) -> None:
    class Guided:
        config = SimpleNamespace(is_distilled=False)

        @property
        def do_classifier_free_guidance(self) -> bool:
            scale: float = self._guidance_scale  # type: ignore[attr-defined]
            return scale > bound and not self.config.is_distilled

    assert _guides_at_one(Guided(), "guidance_scale") is expected
