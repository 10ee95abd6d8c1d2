"""A scheduler that is no component: diffusers leaves optional arguments with a default out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.integration.workshop import (
    GATE,
    JOINT,
    Workshop,
    arguments,
    distance,
    latents,
    only,
)
from tests.ranks import RankError
from xfuser_runtime.pipelines import base_pipeline
from xfuser_runtime.pipelines.components import modules_of, parts_of
from xfuser_runtime.schedulers import xFuserSchedulerBaseWrapper

PAIR = "tests.toys.pair_pipeline:ToyPairPipeline"


def call(pipe: Any) -> torch.Tensor | None:
    """Final latents of one call, where this rank has them."""
    output = pipe(**arguments(pipe))
    return None if output is None else latents(output)


def assigned(rank: int, pipe: Any) -> torch.Tensor | None:
    """As `call`, with the scheduler assigned after wrapping, which has always wrapped it."""
    pipe.scheduler = pipe.scheduler
    return call(pipe)


def test_the_scheduler_is_wrapped(workshop: Workshop) -> None:
    stock = workshop.stock(PAIR)
    assert "scheduler" not in stock.components

    def body(rank: int, pipe: Any) -> torch.Tensor | None:
        assert isinstance(pipe.scheduler, xFuserSchedulerBaseWrapper)
        return call(pipe)

    expected = call(stock)
    assert distance(only(workshop.run(PAIR, "pp2", body)), expected) <= GATE
    expected = only(workshop.run(PAIR, "pipefusion", assigned))
    assert torch.equal(only(workshop.run(PAIR, "pipefusion", body)), expected)


def test_a_scheduler_that_is_not_wrapped_is_caught(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sabotage: wrapping goes over the components alone."""
    monkeypatch.setattr(base_pipeline, "parts_of", lambda pipe: pipe.components)
    with pytest.raises(RankError, match="IndexError"):
        workshop.run(PAIR, "pipefusion", lambda rank, pipe: call(pipe))


def test_each_part_once(workshop: Workshop) -> None:
    """Components come first and keep their names; attributes add what they lack."""
    pair, joint = workshop.stock(PAIR), workshop.stock(JOINT)
    assert parts_of(pair)["scheduler"] is pair.scheduler
    assert set(parts_of(joint)) >= set(joint.components)
    joint.again = joint.transformer
    assert list(modules_of(joint)) == ["text_encoder", "vae", "transformer"]
