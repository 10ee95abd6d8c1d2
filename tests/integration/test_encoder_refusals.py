"""Encoders that cannot be on one rank alone: refused when wrapped, by every rank at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from peft import LoraConfig, inject_adapter_in_model

from tests.integration.workshop import MODES, PIXART, Workshop, engine
from tests.ranks import run_ranks
from xfuser_runtime.proofs import UnprovenWarning

CFG: dict[str, Any] = {**MODES["cfg2"], "text_encoders_on_first_rank": True}


def wrapped(workshop: Workshop, change: Callable[[int, Any], None]) -> list[str]:
    """What wrapping raises on each of two ranks whose pipelines `change` was applied to."""
    wrapper, stock = workshop.wrapper(PIXART), workshop.stock(PIXART)

    def rank_main(rank: int) -> str:
        warnings.simplefilter("ignore", UnprovenWarning)
        change(rank, stock)
        try:
            wrapper(stock, engine(CFG))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    return run_ranks(rank_main, 2)


def hook(pipe: Any) -> None:
    """Offloading by accelerate."""
    add_hook_to_module(pipe.text_encoder, CpuOffload("cpu"))


def adapt(pipe: Any) -> None:
    """An adapter in the encoder."""
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q"]), pipe.text_encoder)


def watch(pipe: Any) -> None:
    """A hook of the user's."""
    pipe.text_encoder.shared.register_forward_hook(lambda *args: None)


def compiled(pipe: Any) -> None:
    """The encoder inside of torch's module."""
    pipe.text_encoder = torch.compile(pipe.text_encoder, backend="eager")


@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (hook, "text_encoder with hooks of accelerate (offloading), expected a plain"),
        (adapt, "text_encoder with adapters, expected a plain model"),
        (watch, "text_encoder with forward hooks, expected a plain model"),
        (compiled, "text_encoder inside a OptimizedModule, expected a plain model"),
    ],
)
def test_an_encoder_that_is_not_plain_is_refused(
    workshop: Workshop, change: Any, words: str, ranks: tuple[int, ...]
) -> None:
    """On every rank, also where one rank's encoder alone is so."""

    def change_some(rank: int, pipe: Any) -> None:
        if rank in ranks:
            change(pipe)

    for found in wrapped(workshop, change_some):
        assert found.startswith("NotSupportedError: ") and words in found


def test_a_plain_encoder_is_not_refused(workshop: Workshop) -> None:
    assert wrapped(workshop, lambda rank, pipe: None) == ["", ""]


def test_different_encoders_are_refused(workshop: Workshop) -> None:
    def shorten(rank: int, pipe: Any) -> None:
        if rank:
            del pipe.text_encoder.encoder.block[-1]

    for found in wrapped(workshop, shorten):
        assert "whose weights are not those of the" in found


def test_an_encoder_on_one_rank_only_is_refused(workshop: Workshop) -> None:
    def leave_out(rank: int, pipe: Any) -> None:
        if rank:
            pipe.text_encoder = None

    for found in wrapped(workshop, leave_out):
        assert "encoders [] on rank 1 and ['text_encoder'] on rank 0" in found
