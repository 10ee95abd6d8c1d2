"""Which axes guidance doubles, and at which scale a class stops to guide."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from porter.probe.capture import TransformerCall, first_step_calls
from porter.probe.guidance import Guidance, measure_guidance
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
            ) -> Any:
                longest = max(len(sample) for sample in x)
                if control is not None and control[0].shape[1] != longest:
                    raise ValueError("tokens of another length")
                if style == "a row for all":
                    return (list(x + x[:1]),)
                return (list(x),)

        class Control(ModelMixin):  # type: ignore[misc]
            def forward(self, x: Any) -> Any:
                longest = max(len(sample) for sample in x)
                return {0: torch.zeros(len(x), longest, 3)}

        self.style = style
        self.scheduler = Scheduler()
        self.components = {"transformer": Transformer()}
        if "control" in style:
            self.components["controlnet"] = Control()

    def __call__(self, batch: int, guided: bool, text: int = 0) -> None:
        transformer, latents = self.components["transformer"], torch.zeros(batch, 3)
        twice = 2 if guided or self.style == "always" else 1
        x: Any = torch.zeros(batch * twice, 3)
        control = None
        if self.style == "a row for all":
            x = torch.arange(3.0 * len(x)).view(len(x), 3)
        if "lists" in self.style:
            # Of long prompts alone the branches differ in length.
            x = [torch.zeros(3 + 4 * text * (n < batch)) for n in range(batch * twice)]
        if "tokens" in self.style:
            control = {0: torch.zeros(batch * twice, 3, 3)}
        if "control" in self.style:
            control = self.components["controlnet"](x)
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
        both = self.style == "both in the latents"
        self.scheduler.step(None, 0, torch.cat([latents] * twice) if both else latents)


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("one call", Guidance("batched", {"x": 0, "scale.of": 1})),
        ("short lists", Guidance("batched", {"x": "items", "scale.of": 1})),
        (
            "lists and control",
            Guidance(
                "padded",
                {"x": "items", "scale.of": 1, "control.0": 0},
                {"controlnet": {"x": "items"}},
            ),
        ),
        ("tokens", Guidance("batched", {"x": 0, "scale.of": 1, "control.0": 0})),
        ("always", Guidance("batched", {"x": 0, "scale.of": 1})),
        ("both in the latents", Guidance("carried", {"x": 0, "scale.of": 1})),
        ("a row for all", Guidance("coupled", {"x": 0, "scale.of": 1})),
        ("further calls", Guidance("batched", {"x": 0, "scale.of": 1})),
        ("two calls", Guidance("sequential")),
        ("two calls always", Guidance("sequential")),
    ],
)
def test_styles(style: str, expected: Guidance) -> None:
    def text_of(text: int) -> int:
        return 0 if style == "short lists" else text

    pipeline = Pipeline(style)

    def calls_of(
        *, batch_size: int, guidance: bool, text: int = 0
    ) -> tuple[TransformerCall, ...]:
        kwargs = {"batch": batch_size, "guided": guidance, "text": text_of(text)}
        return first_step_calls(pipeline, kwargs)

    assert measure_guidance(pipeline, calls_of) == expected


def test_a_pipeline_of_one_prompt_is_asked_for_one() -> None:
    pipeline = Pipeline("one call")

    def calls_of(*, batch_size: int, guidance: bool) -> tuple[TransformerCall, ...]:
        return first_step_calls(pipeline, {"batch": 1, "guided": guidance})

    expected = Guidance("batched", {"x": 0, "scale.of": 1})
    assert measure_guidance(pipeline, calls_of) == Guidance("none")
    assert measure_guidance(pipeline, calls_of, (1,)) == expected


def test_a_step_alike_with_guidance_has_one_branch() -> None:
    pipeline = Pipeline("one call")

    def calls_of(*, batch_size: int, guidance: bool) -> tuple[TransformerCall, ...]:
        return first_step_calls(pipeline, {"batch": batch_size, "guided": False})

    assert measure_guidance(pipeline, calls_of) == Guidance("single")


def test_stock_that_fails_tells_nothing() -> None:
    def calls_of(*, batch_size: int, guidance: bool) -> tuple[TransformerCall, ...]:
        raise ValueError("no such prompt")

    assert measure_guidance(Pipeline("one call"), calls_of) == Guidance("none")


@pytest.mark.parametrize(("bound", "expected"), [(0, True), (1, False)])
def test_the_class_says_where_guidance_begins(bound: int, expected: bool) -> None:
    class Guided:
        config = SimpleNamespace(is_distilled=False)

        @property
        def do_classifier_free_guidance(self) -> bool:
            scale: float = self._guidance_scale  # type: ignore[attr-defined]
            return scale > bound and not self.config.is_distilled

    assert _guides_at_one(Guided(), "guidance_scale") is expected
