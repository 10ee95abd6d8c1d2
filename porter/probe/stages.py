"""What a run shows against stages: blocks that another model runs, arguments that a call uses up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from porter.analysis.facts import TransformerFacts
from porter.probe.capture import TransformerCall, copied


def unfit_for_stages(
    pipeline: Any,
    calls: Mapping[str, TransformerCall],
    transformers: Mapping[str, TransformerFacts],
    others: Iterable[str],
) -> str:
    """Why a measured pipeline admits no stages, or ''.

    Args:
        pipeline: the shrunken stock pipeline.
        calls: the first call of each component.
        transformers: facts by component name.
        others: components that a step calls besides.
    """
    for other in others:
        held = set(getattr(pipeline, other).modules())
        for name, facts in transformers.items():
            for loop in facts.loops:
                if held & set(getattr(getattr(pipeline, name), loop.blocks)):
                    return (
                        f"{other} runs the {name}'s {loop.blocks}, of which a stage "
                        "holds a part"
                    )
    for name in transformers:
        for argument in _emptied(getattr(pipeline, name), calls[name]):
            return f"the {name} takes items out of {argument}, which a stage gives it twice"
    return ""


def _emptied(model: nn.Module, call: TransformerCall) -> list[str]:
    """The arguments of a call whose lists are shorter after it."""
    arguments = copied(call.arguments)
    lengths = {n: len(v) for n, v in arguments.items() if isinstance(v, list)}
    if lengths:
        with torch.no_grad():
            model(**arguments)
    return [name for name, length in lengths.items() if len(arguments[name]) < length]
