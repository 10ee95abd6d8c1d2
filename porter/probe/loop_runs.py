"""Runs a model's `forward` and notes what each block loop sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import libcst as cst
import torch
from torch import nn

from porter.analysis.block_loops import BlockLoop
from porter.parsed import ParsedModule
from porter.probe.capture import TransformerCall, copied
from porter.probe.instrument import Probes, instrumented_forward
from porter.probe.leaves import leaf_shapes
from porter.verify.hooks import AttentionCall, replaced_attention

Shapes = dict[str, dict[str, tuple[int, ...]]]
"""Shape of every tensor, by variable and path."""


@dataclass
class LoopRun:
    """What one run saw at one loop.

    Attributes:
        shapes: of the tensors that the loop reads or carries, before it.
        inside: of those that it carries, fills or makes, at the end of an iteration; of a
            list that is filled and emptied, while it held most.
        integers: the integers that the loop reads, before it.
    """

    shapes: Shapes = field(default_factory=dict)
    inside: Shapes = field(default_factory=dict)
    integers: dict[str, int] = field(default_factory=dict)


def run_loops(
    model: nn.Module,
    source: ParsedModule,
    forward: cst.FunctionDef,
    loops: tuple[BlockLoop, ...],
    call: TransformerCall,
) -> dict[str, LoopRun]:
    """One instrumented forward; what each loop saw, by block list.

    Shapes alone are looked at, so attention, most of the cost, computes nothing.
    """
    seen: dict[str, LoopRun] = {}
    by_blocks = {loop.blocks: loop for loop in loops}

    def before(blocks: str, names: dict[str, Any]) -> None:
        run, loop = seen.setdefault(blocks, LoopRun()), by_blocks[blocks]
        for name in _bound((*loop.reads, *loop.carried), names):
            run.shapes[name] = leaf_shapes(names[name])
            if type(names[name]) is int:
                run.integers[name] = names[name]

    def inside(blocks: str, names: dict[str, Any]) -> None:
        run, loop = seen[blocks], by_blocks[blocks]
        for name in _bound((*loop.carried, *loop.filled, *loop.later), names):
            shapes = leaf_shapes(names[name])
            if name not in loop.filled or len(shapes) >= len(run.inside.get(name, {})):
                run.inside[name] = shapes

    function = instrumented_forward(
        source, forward, loops, model, Probes(before, inside)
    )
    with torch.no_grad(), replaced_attention(_blank):
        function(**copied(call.arguments))
    return seen


def _blank(call: AttentionCall) -> torch.Tensor:
    """A result of the shape that a call of attention gives."""
    shape = (*call.query.shape[:-1], call.value.shape[-1])
    return call.query.new_zeros(shape)


def _bound(wanted: Iterable[str], names: Mapping[str, Any]) -> list[str]:
    """Those of `wanted` that are bound, each once and in order: facts follow it."""
    return [name for name in dict.fromkeys(wanted) if name in names]


def run_swapped(
    model: nn.Module,
    source: ParsedModule,
    forward: cst.FunctionDef,
    loop: BlockLoop,
    call: TransformerCall,
    swap: Callable[[str, Any], Any],
) -> None:
    """One forward in which `swap` replaces what a loop reads, (name, value) -> value."""
    probes = Probes(
        before=lambda blocks, names: None,
        swap=lambda blocks, name, value: swap(name, value),
    )
    function = instrumented_forward(source, forward, (loop,), model, probes)
    function(**copied(call.arguments))
