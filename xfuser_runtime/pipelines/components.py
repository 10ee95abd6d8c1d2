"""The parts of a pipeline, and the wrapped transformers in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from xfuser_runtime.transformers import xFuserTransformerBaseWrapper


def parts_of(pipeline: Any) -> dict[str, Any]:
    """What a pipeline is made of, by name, each once.

    diffusers leaves optional arguments that have a default out of `components`, so the
    pipeline's attributes are gone over as well.
    """
    parts: dict[str, Any] = {}
    seen: set[int] = set()
    for name, part in [*pipeline.components.items(), *vars(pipeline).items()]:
        if id(part) not in seen:
            seen.add(id(part))
            parts[name] = part
    return parts


def modules_of(pipeline: Any) -> dict[str, nn.Module]:
    """The modules among `parts_of` a pipeline."""
    return {
        name: part
        for name, part in parts_of(pipeline).items()
        if isinstance(part, nn.Module)
    }


def wrapped_transformers(
    component: nn.Module,
) -> Iterator[xFuserTransformerBaseWrapper]:
    """The wrapped transformers in a component: itself, or what it holds.

    A compiled module and a model of adapters hold the transformer further down.
    """
    for module in component.modules():
        if isinstance(module, xFuserTransformerBaseWrapper):
            yield module


def wrapped_transformer(component: nn.Module) -> xFuserTransformerBaseWrapper:
    """The wrapped transformer that a component is or holds.

    Raises:
        ValueError: when there is none.
    """
    for found in wrapped_transformers(component):
        return found
    raise ValueError(
        f"no ported transformer in a component of class {type(component).__name__}, "
        "expected one; port the pipeline that holds it"
    )
