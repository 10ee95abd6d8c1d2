"""Stages are refused where another model runs the blocks, or a call uses up its arguments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from porter.analysis.facts import LoopFacts, PipelineFacts, TransformerFacts
from porter.probe.capture import TransformerCall
from porter.probe.stages import unfit_for_stages

BLOCKS = LoopFacts("blocks", {}, None, None, (), {})
FACTS = {"transformer": TransformerFacts((BLOCKS,), {}, (), ())}


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def forward(self, x: torch.Tensor, hints: list[torch.Tensor]) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) + hints.pop()
        return x


def _reason(net: nn.Module, transformer: nn.Module, hints: Any) -> str:
    arguments = {"x": torch.ones(1, 2), "hints": hints}
    calls = {"transformer": TransformerCall("transformer", arguments)}
    pipeline = SimpleNamespace(net=net, transformer=transformer)
    return unfit_for_stages(pipeline, calls, FACTS, ("net",))


def test_blocks_that_another_model_runs_belong_to_no_stage() -> None:
    transformer, net = _Transformer(), nn.Module()
    net.refiner = transformer.blocks
    reason = _reason(net, transformer, (torch.ones(2),) * 2)
    assert "net runs the transformer's blocks" in reason


def test_lists_that_a_call_uses_up_are_found_and_left_whole() -> None:
    hints = [torch.ones(2), torch.ones(2)]
    reason = _reason(nn.Module(), _Transformer(), hints)
    assert "takes items out of hints" in reason and len(hints) == 2


def test_lists_that_a_call_reads_alone_are_no_reason() -> None:
    class Reads(_Transformer):
        def forward(self, x: torch.Tensor, hints: list[torch.Tensor]) -> torch.Tensor:
            return x + sum(hints)

    assert _reason(nn.Module(), Reads(), [torch.ones(2)]) == ""
    assert PipelineFacts("none", {}, {}).no_stages == ""
