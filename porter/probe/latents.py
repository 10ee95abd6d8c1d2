"""Which rows of a stream come from the latents: two runs that differ in the latents alone.

All attention returns zeros in both runs, so that no token hears of another one: a row of
a stream differs between the runs exactly where the latents reach it directly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import libcst as cst
import torch
from torch import nn

from porter.analysis.block_loops import BlockLoop
from porter.parsed import ParsedModule
from porter.probe.capture import TransformerCall
from porter.probe.instrument import instrumented_forward
from porter.verify.hooks import AttentionCall, replaced_attention

Place = tuple[int, int, int]
"""(first row, row behind the last one, number of rows) of the latents in a stream."""


def latent_places(
    model: nn.Module,
    source: ParsedModule,
    forward: cst.FunctionDef,
    loops: tuple[BlockLoop, ...],
    call: TransformerCall,
) -> dict[str, dict[str, Place]]:
    """Place of the latents in each carried stream, by block list and name.

    The latents are the call's first floating-point tensor.  Streams that hold their rows in
    several pieces are left out.
    """
    name = next(
        (
            key
            for key, value in call.arguments.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        ),
        None,
    )
    if name is None:
        return {}
    plain = dict(call.arguments)
    noise = torch.randn(plain[name].shape, generator=torch.Generator().manual_seed(0))
    moved = plain | {name: plain[name] + noise.to(plain[name].dtype)}
    first = _streams(model, source, forward, loops, plain)
    second = _streams(model, source, forward, loops, moved)
    places: dict[str, dict[str, Place]] = {}
    for blocks, streams in first.items():
        for key, stream in streams.items():
            place = _place(stream, second.get(blocks, {}).get(key))
            if place is not None:
                places.setdefault(blocks, {})[key] = place
    return places


def _streams(
    model: nn.Module,
    source: ParsedModule,
    forward: cst.FunctionDef,
    loops: tuple[BlockLoop, ...],
    arguments: Mapping[str, Any],
) -> dict[str, dict[str, torch.Tensor]]:
    """The carried tensors at each loop, by block list and name."""
    seen: dict[str, dict[str, torch.Tensor]] = {}
    carried = {loop.blocks: loop.carried for loop in loops}

    def report(blocks: str, names: dict[str, Any]) -> None:
        seen[blocks] = {
            name: names[name].clone()
            for name in carried[blocks]
            if isinstance(names.get(name), torch.Tensor)
        }

    function = instrumented_forward(source, forward, loops, model, report)
    copied = {
        name: dict(value) if isinstance(value, dict) else value
        for name, value in arguments.items()
    }
    with torch.no_grad(), replaced_attention(_zeros):
        function(**copied)
    return seen


def _zeros(call: AttentionCall) -> torch.Tensor:
    shape = (*call.query.shape[:-1], call.value.shape[-1])
    return call.query.new_zeros(shape)


def _place(first: torch.Tensor, second: torch.Tensor | None) -> Place | None:
    if second is None or first.shape != second.shape or first.ndim != 3:
        return None
    # Tokens lie along dimension 1, in sequence-first models along dimension 0.
    dim = 1 if first.shape[1] >= first.shape[0] else 0
    rows = (first != second).any(dim=2).any(dim=1 - dim).nonzero().flatten().tolist()
    if not rows or rows[-1] - rows[0] + 1 != len(rows):
        return None
    return rows[0], rows[-1] + 1, first.shape[dim]
