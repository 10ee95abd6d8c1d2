"""Processors that some calls set are ported where blocks do with them what they do else."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from porter.analysis.facts import TransformerFacts
from porter.errors import Refusal
from porter.probe import call_processors
from porter.probe.call_processors import with_call_processors


class Own: ...


class Perturbed: ...


FACTS = TransformerFacts((), {"blocks.*.attn": ("image",)}, ("toy.Own",), ())


class Pipeline:
    """Sets another processor in calls with a scale."""

    def __init__(self) -> None:
        self.transformer = SimpleNamespace(
            attn_processors={"blocks.0.attn.processor": Own(), "other.attn": Own()}
        )

    def __call__(self, pag_scale: float = 3.0) -> None: ...


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    monkeypatch.setattr(call_processors, "kept_processors", lambda _: nullcontext())
    monkeypatch.setattr(
        call_processors, "qualified_name", lambda c: f"toy.{c.__name__}"
    )


def _found(measured: TransformerFacts | None) -> TransformerFacts:
    pipeline = Pipeline()

    def measure(guidance: bool, more: Any) -> TransformerFacts:
        assert more == {"pag_scale": 3.0}
        if measured is None:
            raise Refusal("tokens are mixed")
        pipeline.transformer.attn_processors["blocks.0.attn.processor"] = Perturbed()
        return measured

    return with_call_processors(pipeline, "transformer", FACTS, measure)


def test_measured_alike_they_are_ported_and_marked() -> None:
    found = _found(FACTS)
    assert found.processors == ("toy.Own", "toy.Perturbed")
    assert found.batch_processors == ("toy.Perturbed",)


def test_other_remedies_or_a_refusal_leave_them_out() -> None:
    mixing = replace(FACTS.mixing, summing=("blocks.*.attn",))
    assert _found(replace(FACTS, mixing=mixing)) == FACTS
    assert _found(None) == FACTS


def test_a_pipeline_without_such_calls_is_left_alone() -> None:
    facts = with_call_processors(
        SimpleNamespace(), "transformer", FACTS, lambda *_: 1 / 0
    )
    assert facts == FACTS
