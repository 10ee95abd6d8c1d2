"""What all wrapped layers share: wrapping in place, and state kept per transformer call."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar

from torch import nn

from xfuser_runtime.base_wrapper import swap_class, xFuserBaseWrapper
from xfuser_runtime.distributed.runtime_state import (
    get_runtime_state,
    runtime_state_is_initialized,
)
from xfuser_runtime.layers.register import xFuserLayerWrappersRegister


class Resettable(Protocol):
    """State of passes that can be forgotten."""

    def reset(self) -> None:
        """Forget all; memory may be kept for the next run."""


T = TypeVar("T", bound=Resettable)


class xFuserLayerBaseWrapper(xFuserBaseWrapper):
    """A layer whose class was swapped for a subclass that works on part of the rows.

    State-dict keys, hooks, `isinstance` and device placement are those of the layer.
    """


class CallSites(Generic[T]):
    """State of a layer that a patch pass inherits from earlier passes, by place of use.

    A place is (transformer call of the pass, n-th use of the layer in it): conditional and
    unconditional calls never share state, nor do two uses in one forward.

    Args:
        make: an empty state.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._held: dict[tuple[int, int], T] = {}
        self._marker: object = None
        self._pass: tuple[int, int | None, int] | None = None
        self._uses = 0

    def next(self, marker: object) -> T:
        """The state of the next use.

        Args:
            marker: an object that lives as long as one forward pass, and no longer; a new
                one starts to count from the first use.
        """
        step, patch, call = current_pass()
        if self._marker is not marker or self._pass != (step, patch, call):
            self._marker, self._pass, self._uses = marker, (step, patch, call), 0
            if step == 0 and patch in (None, 0):
                # A run begins: what an earlier run left must not be read.
                for place, state in self._held.items():
                    if place[0] == call:
                        state.reset()
        key = (call, self._uses)
        self._uses += 1
        if key not in self._held:
            self._held[key] = self._make()
        return self._held[key]

    def items(self) -> Iterable[tuple[tuple[int, int], T]]:
        """The places used so far, (transformer call, n-th use), with their states."""
        return self._held.items()

    def reset(self) -> None:
        """Forget everything; states may keep their memory for the next run."""
        for state in self._held.values():
            state.reset()
        self._marker = self._pass = None

    def __deepcopy__(self, memo: dict[int, Any]) -> CallSites[T]:
        # A copied layer belongs to another model: it begins with nothing kept.
        return CallSites(self._make)


def current_pass() -> tuple[int, int | None, int]:
    """(step, patch, transformer call) of the running pass; (0, None, 0) outside of a run."""
    if not runtime_state_is_initialized():
        return 0, None, 0
    state = get_runtime_state()
    return state.step, state.patch, state.call_index


def wrap_layer(module: nn.Module) -> nn.Module:
    """Swap the class of a layer for its registered wrapper; returns the same object.

    A subclass that leaves `forward` alone is wrapped as the class that it extends.

    Raises:
        ValueError: no wrapper is registered for the layer (the manual's message), or a
            hook would go on calling the upstream forward.
    """
    original = type(module)
    if issubclass(original, xFuserLayerBaseWrapper):
        return module
    swap_class(module, wrapper_of(original))
    rebind_forward(module, original)
    return module


def wrapper_of(original: type[nn.Module]) -> type:
    """The wrapper class for instances of `original`.

    Raises:
        ValueError: none is registered (the manual's message).
    """
    for base in original.__mro__:
        found = xFuserLayerWrappersRegister.find(base)
        same_forward = getattr(base, "forward", None) is original.forward
        if found is not None and same_forward:
            return found if base is original else derive(found, original)
    return xFuserLayerWrappersRegister.get_class(original)


@functools.cache
def derive(wrapper: type, original: type) -> type:
    """A wrapper class for `original` that behaves as `wrapper`; the same one every time."""
    name = f"xFuser{original.__name__.removesuffix('Model')}Wrapper"
    namespace = {"__module__": original.__module__, "__doc__": wrapper.__doc__}
    return type(name, (wrapper, original), namespace)


def rebind_forward(module: nn.Module, original: type[nn.Module]) -> None:
    """Make hooks that hold upstream's bound forward call the wrapper's.

    accelerate keeps it as `_old_forward`, diffusers' `HookRegistry` in its references.

    Raises:
        ValueError: the instance has a forward of its own that no known hook explains.
    """
    bound = types.MethodType(type(module).forward, module)

    def fresh(held: Any) -> Any:
        return bound if getattr(held, "__func__", None) is original.forward else held

    held_by = [(module, "_old_forward")] if "_old_forward" in vars(module) else []
    registry = vars(module).get("_diffusers_hook")
    for reference in [] if registry is None else registry._fn_refs:
        held_by += [(reference, "forward"), (reference, "original_forward")]
    for holder, name in held_by:
        setattr(holder, name, fresh(getattr(holder, name, None)))
    if "forward" in vars(module) and not held_by:
        raise ValueError(
            f"a {original.__name__} with a forward of its own, expected the class's; "
            "remove the hook, wrap, and install it again"
        )
