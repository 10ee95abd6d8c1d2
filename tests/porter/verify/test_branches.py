"""Branches computed apart, and processors that a call leaves behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import ModelMixin

from porter.verify.branches import branches_apart, computed_apart
from porter.verify.cases import Case
from porter.verify.hooks import kept_processors
from porter.verify.modes import parse_mode

AXES: dict[str, int | str] = {"x": "items", "t": 0}


class Padding(ModelMixin):  # type: ignore[misc]
    """Pads each sample to the longest of the list that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.attn_processors: dict[str, str] = {"attn.processor": "own"}

    def forward(self, x: list[torch.Tensor], t: torch.Tensor) -> Any:
        self.calls += 1
        longest = max(map(len, x))
        return ([time * longest for time in t],)

    def set_attn_processor(self, processors: dict[str, str]) -> None:
        self.attn_processors = {name: processors.pop(name) for name in [*processors]}


def _pipeline() -> Any:
    return SimpleNamespace(components={"transformer": Padding()})


def test_each_branch_is_a_call_of_its_own() -> None:
    pipeline = _pipeline()
    model = pipeline.components["transformer"]
    samples, times = [torch.ones(n) for n in (2, 3, 5, 7)], torch.ones(4)
    with branches_apart(pipeline, AXES, 2):
        assert model(samples, times)[0] == [3, 3, 7, 7]
        assert model(samples[:2], times[:2])[0] == [3, 3]
    assert model.calls == 3 and type(model) is Padding
    with branches_apart(pipeline, {}, 2):
        assert model(samples, times)[0] == [7] * 4


def test_only_lists_have_lengths_of_their_own() -> None:
    assert computed_apart("batched", AXES) == AXES
    assert computed_apart("batched", {"t": 0}) == {}
    assert computed_apart("sequential", {}) == {}


def test_processors_come_back_when_a_call_fails() -> None:
    pipeline = _pipeline()
    model = pipeline.components["transformer"]
    with pytest.raises(ValueError, match="boom"), kept_processors(pipeline):
        model.set_attn_processor({"attn.processor": "perturbed"})
        raise ValueError("boom")
    assert model.attn_processors == {"attn.processor": "own"}


@pytest.mark.parametrize(
    ("mode", "ported", "suits"),
    [
        ("cfg2", False, True),
        ("dp2", False, True),
        ("ulysses2", False, False),
        ("ulysses2", True, True),
        ("cfg2xring2", True, True),
        ("pp2", True, False),
    ],
)
def test_calls_with_other_processors_suit_what_was_measured(
    mode: str, ported: bool, suits: bool
) -> None:
    case = Case(2, 1, 0, True, more=(("pag_scale", 3.0),))
    assert case.suits(parse_mode(mode), ported=ported) is suits
