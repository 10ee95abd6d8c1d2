"""The wrapped transformers in the components of a pipeline."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from xfuser_runtime.transformers import xFuserTransformerBaseWrapper


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
