"""The wrapper of every scheduler (manual, section 3).

The manual has a person change `step` of each scheduler class.  Here one wrapper serves all
of them, since a scheduler that works element by element needs nothing of its own: each
patch has a copy of the scheduler's state, and noise is drawn once a step for all patches.
Whether a scheduler works element by element is measured, not looked up by name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from xfuser_runtime.base_wrapper import (
    EqualsUpstream,
    swap_class,
    upstream_class,
    xFuserBaseWrapper,
)
from xfuser_runtime.distributed.runtime_state import (
    get_runtime_state,
    runtime_state_is_initialized,
)
from xfuser_runtime.schedulers.copies import COPIES, PatchCopies, without_copies
from xfuser_runtime.schedulers.register import xFuserSchedulerWrappersRegister
from xfuser_runtime.schedulers.step import StepCall


class xFuserSchedulerBaseWrapper(xFuserBaseWrapper, metaclass=EqualsUpstream):
    """A scheduler that steps whole latents or one patch, as the runtime state says.

    On whole latents it is the upstream scheduler.  In a patch pass, `step` takes and
    returns whole tensors of which only the patch's rows are new.  On a stage that is not
    the last, `step` keeps its counters and random numbers going and returns the sample
    as it came.

    A subclass that overrides a method stands before the upstream class in its bases:
    `class xFuserXWrapper(xFuserSchedulerBaseWrapper, X)`.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Every `step` keeps its signature: pipelines inspect it to pass eta, generator."""
        super().__init_subclass__(**kwargs)
        original = upstream_class(cls)
        for name in _step_names(cls):
            function = getattr(cls, name)
            # One that overrides upstream's may take `*args`.
            signature = inspect.signature(getattr(original, name, function))
            setattr(cls, name, _in_pass(function, signature))
        if hasattr(cls, "set_timesteps"):
            cls.set_timesteps = _starts_schedule(cls.set_timesteps)

    def __getattribute__(self, name: str) -> Any:
        if name != "__dict__":
            _select_copy(self)
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        _select_copy(self)
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copies and pickles hold the state at hand, not the copies of other patches."""
        own = without_copies(vars(self))
        return _new_wrapper, (upstream_class(type(self)),), own

    @classmethod
    def from_config(cls, *args: Any, **kwargs: Any) -> Any:
        """A scheduler of the upstream class; assigning it to a pipeline wraps it."""
        return upstream_class(cls).from_config(*args, **kwargs)  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """A scheduler of the upstream class; assigning it to a pipeline wraps it."""
        return upstream_class(cls).from_pretrained(*args, **kwargs)  # type: ignore[attr-defined]

    @classmethod
    def _get_compatibles(cls) -> Any:
        return upstream_class(cls)._get_compatibles()  # type: ignore[attr-defined]


def wrap_scheduler(scheduler: Any) -> Any:
    """Swap the class of `scheduler` for its wrapper; a wrapped one is returned as it is.

    Raises:
        ValueError: when it has no `step` (the manual's message).
    """
    if not isinstance(scheduler, xFuserSchedulerBaseWrapper):
        swap_class(scheduler, _wrapper_class(type(scheduler)))
    return scheduler


def _wrapper_class(original: type) -> type:
    found = xFuserSchedulerWrappersRegister.find(original)
    if found is not None and upstream_class(found) is original:
        return found
    if not _step_names(original):
        return xFuserSchedulerWrappersRegister.get_class(original)  # raises
    wrapper = EqualsUpstream(
        f"xFuser{original.__name__}Wrapper",
        (xFuserSchedulerBaseWrapper, original),
        {"__module__": original.__module__, "__doc__": original.__doc__},
    )
    return xFuserSchedulerWrappersRegister.register(original)(wrapper)


def _new_wrapper(original: type) -> Any:
    return object.__new__(_wrapper_class(original))


def _step_names(cls: type) -> list[str]:
    # Some schedulers have several (`step_prk`, `step_plms`), which pipelines may call.
    return [
        name
        for name in dir(cls)
        if (name == "step" or name.startswith("step_"))
        and inspect.isfunction(getattr(cls, name))
    ]


def _select_copy(scheduler: Any) -> None:
    # Runs at every access to an attribute: nothing here may look at one.
    attributes = object.__getattribute__(scheduler, "__dict__")
    copies = attributes.get(COPIES)
    if copies is not None and copies.busy:
        return
    patch = get_runtime_state().patch if runtime_state_is_initialized() else None
    if copies is None:
        if patch is None:
            return
        copies = attributes[COPIES] = PatchCopies()
    if copies.active != patch:
        copies.activate(scheduler, patch)


def _starts_schedule(upstream: Callable[..., Any]) -> Callable[..., Any]:
    if hasattr(upstream, "_xfuser_wraps"):
        return upstream

    @functools.wraps(upstream)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        copies = vars(self).get(COPIES)
        if copies is None or copies.busy:
            return upstream(self, *args, **kwargs)
        copies.join(self)
        copies.forget_call()
        copies.busy = True
        try:
            return upstream(self, *args, **kwargs)
        finally:
            copies.busy = False

    return _as_upstream(set_timesteps, inspect.signature(upstream))


def _in_pass(
    upstream: Callable[..., Any], signature: inspect.Signature
) -> Callable[..., Any]:
    if hasattr(upstream, "_xfuser_wraps"):
        return upstream

    @functools.wraps(upstream)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not runtime_state_is_initialized():
            return upstream(self, *args, **kwargs)
        state = get_runtime_state()
        copies = vars(self).get(COPIES)
        if copies is None:
            copies = vars(self)[COPIES] = PatchCopies()
        if copies.busy:  # a `step` that calls another one
            return upstream(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        state.scheduler_stepped()
        return StepCall(self, upstream, bound, copies, state).run()

    return _as_upstream(step, signature)


def _as_upstream(wrapper: Any, signature: inspect.Signature) -> Callable[..., Any]:
    wrapper._xfuser_wraps = True
    # `getfullargspec` does not follow `__wrapped__`.
    wrapper.__signature__ = signature
    return wrapper  # type: ignore[no-any-return]
