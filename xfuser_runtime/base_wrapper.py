"""What every wrapper shares: it is a subclass of the class it wraps and answers for it.

A wrapped object is the very object that diffusers made, with its class swapped for a
subclass that holds the rewritten method.  Wherever diffusers looks at the class of an
object (`save_pretrained`, `from_pipe`, `AutoPipeline*`, `to_json_string`) it must find
upstream's, so `obj.__class__` and class equality answer with the upstream class, while
`type(obj)` stays the wrapper.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from xfuser_runtime.distributed.parallel_state import (
    get_pipeline_parallel_world_size,
    get_sequence_parallel_world_size,
)
from xfuser_runtime.distributed.runtime_state import get_runtime_state
from xfuser_runtime.errors import StateError

F = TypeVar("F", bound=Callable[..., Any])


def upstream_class(cls: type) -> type:
    """The class that `cls` wraps: the first base that is no wrapper itself."""
    for base in cls.__mro__[1:]:
        if not issubclass(base, xFuserBaseWrapper) and base is not _AnswersForUpstream:
            return base
    return cls


def upstream_class_of_instance(value: object) -> type:
    """The upstream class of an object that may be wrapped already."""
    cls = type(value)
    return upstream_class(cls) if issubclass(cls, xFuserBaseWrapper) else cls


def swap_class(obj: object, cls: type) -> None:
    """Set the real class of `obj`, past any `__class__` property and `__setattr__`."""
    object.__dict__["__class__"].__set__(obj, cls)


class _AnswersForUpstream:
    """`obj.__class__` is upstream's class, for all code that introspects by it.

    It holds nothing else: a class body that assigns `__class__` cannot use `super()`.
    """

    __class__ = property(lambda self: upstream_class(type(self)))


class EqualsUpstream(type):
    """Metaclass: a wrapper class equals, and hashes as, the class that it wraps.

    `DiffusionPipeline.from_pipe` keeps a component only if `type(component)` is in the
    list of types that its signature names.
    """

    def __eq__(cls, other: object) -> bool:
        if cls is other:
            return True
        return isinstance(other, type) and upstream_class(cls) is (
            upstream_class(other) if isinstance(other, EqualsUpstream) else other
        )

    def __hash__(cls) -> int:
        return type.__hash__(upstream_class(cls))


class xFuserBaseWrapper(_AnswersForUpstream):
    """Root of all wrappers (manual, section 0)."""

    @staticmethod
    def forward_check_condition(forward: F) -> F:
        """Guard a generated `forward` (manual, section 2).

        Without sequence or pipeline parallelism the upstream `forward` runs as it is, so
        that a single device pays nothing for being wrapped.  Otherwise the call is
        counted in the pass (K/V caches are kept per call: a conditional and an
        unconditional call never share one), and the pass learns that it entered
        generated code.

        Outside of a port's denoising loop (a stock pipeline that shares the model, say)
        nothing holds the ranks together, so upstream's `forward` runs there too. Where a
        port leaves the loop as it is, its whole `__call__` counts as the loop.

        Raises:
            StateError: when no runtime state has been initialised, or a model that is
                split into stages is called outside of a port's denoising loop.
        """

        @functools.wraps(forward)
        def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
            stages = get_pipeline_parallel_world_size()
            split = stages > 1 or get_sequence_parallel_world_size() > 1
            state = get_runtime_state()
            # Not the step: torch.compile would compile the call again for each one.
            in_loop = state.latents_shape is not None
            if not split or in_loop or (stages == 1 and state.loop_is_upstreams):
                return self._forward_in_pass(forward, args, kwargs)
            if stages > 1:
                raise StateError(
                    f"a {upstream_class(type(self)).__name__} of {stages} pipeline stages "
                    "called outside of the port's denoising loop, expected a call from "
                    "there; call the wrapped pipeline"
                )
            return upstream_class(type(self)).forward(self, *args, **kwargs)  # type: ignore[attr-defined]

        return checked  # type: ignore[return-value]
