"""The arguments of a captured call: what a graph is fixed to, and copies that keep their address.

Containers are gone through, and so are objects that hold nothing else (a cache of keys and values
that a pipeline hands to every call).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import nn

from xfuser_runtime.cuda.notes import version_of
from xfuser_runtime.transformers.outputs import map_leaves

_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device)


class NotReplayable(Exception):
    """A call that no graph can stand for.

    Args:
        reason: why.
        is_final: no other call of the transformer is worth a try.
    """

    def __init__(self, reason: str, *, is_final: bool = False) -> None:
        super().__init__(reason)
        self.is_final = is_final


def describe(value: Any, *, within: tuple[int, ...] = ()) -> Iterator[Hashable]:
    """Structure, shapes and constants of nested arguments.

    Args:
        value: the arguments.
        within: what holds them, by identity.

    Raises:
        NotReplayable: a value of which is not known what it holds, or that holds itself.
    """
    inner = (*within, id(value))
    if isinstance(value, torch.Tensor):
        yield (tuple(value.shape), value.dtype, value.device)
    elif isinstance(value, _CONSTANTS):
        yield (type(value), value)
    elif isinstance(value, dict):
        yield tuple(value)
        for item in value.values():
            yield from describe(item, within=inner)
    elif isinstance(value, (tuple, list)):
        yield (type(value), len(value))
        for item in value:
            yield from describe(item, within=inner)
    elif _is_holder(value) and id(value) not in within:
        yield (type(value), tuple(vars(value)))
        for item in vars(value).values():
            yield from describe(item, within=inner)
    else:
        raise NotReplayable(f"an argument of type {type(value).__name__}")


def copied(
    value: Any, function: Callable[[torch.Tensor], Any] = lambda tensor: tensor
) -> Any:
    """`value` with containers and objects of its own, and `function` of each tensor."""

    def copy(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return function(leaf)
        if not _is_holder(leaf):
            return leaf
        made = object.__new__(type(leaf))
        vars(made).update(copied(vars(leaf), function))
        return made

    return map_leaves(copy, value)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """All tensors of nested arguments, in order."""
    found: list[torch.Tensor] = []
    copied(value, found.append)
    return found


def state_of(value: Any) -> list[Hashable]:
    """What a call may change in the objects among its arguments."""
    if isinstance(value, dict):
        return [x for item in value.values() for x in state_of(item)]
    if isinstance(value, (tuple, list)):
        return [x for item in value for x in state_of(item)]
    if not _is_holder(value):
        return []
    versions: list[Hashable] = [
        (tensor.data_ptr(), version_of(tensor)) for tensor in tensors_of(value)
    ]
    return [*describe(value), *versions]


def _is_holder(value: Any) -> bool:
    """An object that may keep values as attributes, and nothing else."""
    return (
        hasattr(value, "__dict__")
        and not hasattr(value, "__slots__")
        and not callable(value)
        and not isinstance(
            value, (torch.Tensor, nn.Module, torch.Generator, *_CONSTANTS)
        )
    )
