"""A refusal of the block loops leaves a pipeline what needs no shared call."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from porter.errors import Refusal
from porter.parsed import ParsedModule
from porter.probe import pipeline
from porter.probe.first_steps import FirstSteps

SOURCE = ParsedModule("toy", "toy.py", "class Toy:\n    pass\n")


class Toy(nn.Module):
    """A model that ranks cannot share."""


_HOLDER = SimpleNamespace(transformer=Toy())


@pytest.mark.parametrize(
    ("where", "reason"),
    [("toy.py:2", "toy.py:2: a loop"), ("", "toy.py:1: a loop")],
)
def test_the_reason_stands_in_the_facts(
    where: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise Refusal("a loop", expected="another", where=where)

    monkeypatch.setattr(pipeline, "probe_transformer", refuse)
    found = pipeline._transformer_facts(
        _HOLDER, FirstSteps(_HOLDER), "transformer", SOURCE, [], []
    )
    assert (found.loops, found.processors, found.whole) == ((), (), reason)


def test_a_fault_of_porter_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = SimpleNamespace(args=1)
    monkeypatch.setattr(pipeline, "probe_transformer", broken)
    with pytest.raises(TypeError):
        pipeline._transformer_facts(
            _HOLDER, FirstSteps(_HOLDER), "transformer", SOURCE, [], []
        )
