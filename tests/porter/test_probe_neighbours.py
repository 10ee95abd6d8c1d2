"""Modules beside the blocks of a loop run again on half of the tokens."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from porter.analysis.block_loops import find_block_loops, find_method
from porter.parsed import ParsedModule
from porter.probe.neighbours import mixing_neighbour

B, S, T, C = 2, 6, 5, 8


class Hearing(nn.Module):
    """Tokens ask a context that every rank holds whole."""

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return (x @ context.transpose(1, 2)).softmax(-1) @ context


class Grouping(nn.Module):
    """Groups the tokens by frame, three to a frame."""

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        frames = x.unflatten(1, (-1, 3))
        return (frames + frames.mean(dim=2, keepdim=True)).flatten(1, 2)


class Averaging(nn.Module):
    """Every token hears of all others."""

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return x - x.mean(dim=1, keepdim=True)


class Broken(nn.Module):
    """Runs on all of the tokens alone."""

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != S:
            raise ValueError("other tokens")
        return x


class Context(nn.Module):
    """Takes no tokens at all."""

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        return context.mean(dim=1, keepdim=True)


class Toy(nn.Module):
    """Every second block is followed by a module beside it."""

    def __init__(self, neighbour: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(C, C) for _ in range(4))
        self.beside = nn.ModuleList(neighbour() for _ in range(2))
        self.context = Context()

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index % 2 == 0:
                x = x + self.beside[index // 2](x, context)
            x = x + self.context(context)
        return x


@pytest.mark.parametrize(
    ("neighbour", "expected"),
    [
        (Hearing, ""),
        (Averaging, "beside"),
        (Grouping, ""),
        (Broken, "beside"),
    ],
)
def test_a_module_that_mixes_tokens_is_named(
    neighbour: type[nn.Module], expected: str
) -> None:
    assert _found(neighbour, S) == expected


def test_halves_that_cut_a_group_show_it() -> None:
    assert _found(Grouping, 9) == "beside"


def _found(neighbour: type[nn.Module], tokens: int) -> str:
    torch.manual_seed(0)
    source = ParsedModule(__name__, "toy.py", Path(__file__).read_text("utf-8"))
    forward = find_method(source, source.class_def("Toy"), "forward")
    (loop,) = find_block_loops(source, forward)
    model = Toy(neighbour)
    arguments: dict[str, Any] = {
        "x": torch.randn(B, tokens, C),
        "context": torch.randn(B, T, C),
    }
    run = functools.partial(model.forward, **arguments)
    return mixing_neighbour(model, loop, {"x": tokens}, run)
