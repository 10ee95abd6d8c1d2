"""Shapes of nested arguments and outputs, for values that a rank does not compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Template:
    """A nested output without its data.

    Attributes:
        structure: the output with `torch.Tensor` leaves on the meta device.
        device: where the real leaves live.
    """

    structure: Any
    device: torch.device

    def zeros(self) -> Any:
        """The output with zeros for every tensor."""
        return map_tensors(
            lambda leaf: torch.zeros(leaf.shape, dtype=leaf.dtype, device=self.device),
            self.structure,
        )


def template_of(output: Any) -> Template:
    """The template of a nested output."""
    return Template(
        map_tensors(lambda leaf: leaf.detach().to("meta"), output),
        first_tensor(output).device,
    )


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """`value` with whatever is no container replaced; tuples, lists, dicts and dataclass-like
    `ModelOutput`s keep their type."""
    if isinstance(value, dict):
        mapped = {key: map_leaves(function, item) for key, item in value.items()}
        return mapped if type(value) is dict else type(value)(**mapped)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_leaves(function, item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_leaves(function, item) for item in value)
    return function(value)


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """`value` with every tensor replaced, in the containers of :func:`map_leaves`."""
    return map_leaves(
        lambda leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf, value
    )


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors of a nested value, in order."""
    found: list[torch.Tensor] = []
    map_tensors(found.append, value)
    return found


def first_tensor(value: Any) -> torch.Tensor:
    """The first tensor of a nested value.

    Raises:
        ValueError: when there is none.
    """
    found = tensors_in(value)
    if not found:
        raise ValueError("no tensor in the value, expected at least one")
    return found[0]


def signature_of(value: Any) -> tuple[Any, ...]:
    """Hashable shapes and types of a nested value's tensors."""
    return tuple((tuple(leaf.shape), leaf.dtype) for leaf in tensors_in(value))
