"""First steps of a shrunken pipeline: each call is made once, each input encoded once."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from porter.probe.capture import (
    TransformerCall,
    called_each_step,
    first_step_calls,
)
from porter.shrink import call_kwargs, image_sizes
from porter.verify.hooks import denoisers


class FirstSteps:
    """What the models are called with until the first step, by the arguments of the call.

    A probe asks for the same call several times; and most of a step's time goes into
    encoding pictures, videos and texts, of which many calls have the same ones.

    Args:
        pipeline: the shrunken stock pipeline.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._calls: dict[tuple[Any, ...], tuple[TransformerCall, ...]] = {}
        self._encoded: dict[Any, Any] = {}

    def calls(
        self,
        size: int,
        text: int,
        batch_size: int = 1,
        guidance: bool = True,
        more: Mapping[str, Any] | None = None,
    ) -> tuple[TransformerCall, ...]:
        """The calls of all models in the first of two steps.

        Args:
            size: index of an image size.
            text, batch_size, guidance: see `call_kwargs`.
            more: further arguments.
        """
        return self._made(size, text, batch_size, guidance, more)

    def first_calls(
        self,
        size: int,
        text: int,
        batch_size: int = 1,
        guidance: bool = True,
        more: Mapping[str, Any] | None = None,
    ) -> dict[str, TransformerCall]:
        """The first call of each model; arguments as of `calls`.

        The models are known from the first of all calls: a run ends when it has called
        each of them once, and most of what they compute is never computed.
        """
        known = {call.component for call in self.calls(0, 0, 1, guidance)}
        calls = self._made(size, text, batch_size, guidance, more, known)
        return first_of_each(calls)

    def called_each_step(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of the components `names` that each step of a call calls."""
        kwargs = call_kwargs(self._pipeline, num_inference_steps=4)
        with self._encoding_once():
            return called_each_step(self._pipeline, kwargs, names)

    def _made(
        self,
        size: int,
        text: int,
        batch_size: int,
        guidance: bool,
        more: Mapping[str, Any] | None,
        until: Collection[str] = (),
    ) -> tuple[TransformerCall, ...]:
        key: tuple[Any, ...] = (size, text, batch_size, guidance, repr(more))
        if until and key not in self._calls:
            key = (*key, True)
        if key not in self._calls:
            height, width = image_sizes(self._pipeline)[size]
            kwargs = call_kwargs(
                self._pipeline,
                height=height,
                width=width,
                text=text,
                batch_size=batch_size,
                guidance=guidance,
                num_inference_steps=2,
            )
            with self._encoding_once():
                calls = first_step_calls(
                    self._pipeline, kwargs | dict(more or {}), until
                )
            self._calls[key] = calls
        return self._calls[key]

    @contextmanager
    def _encoding_once(self) -> Iterator[None]:
        """What encodes gives what it gave for the same input."""
        methods = {
            name: (module, "encode" if hasattr(module, "encode") else "forward")
            for name, module in self._pipeline.components.items()
            if isinstance(module, nn.Module) and name not in denoisers(self._pipeline)
        }
        for name, (module, method) in methods.items():
            vars(module)[method] = self._once(name, module, getattr(module, method))
        try:
            yield
        finally:
            for module, method in methods.values():
                del vars(module)[method]

    def _once(
        self, name: str, module: nn.Module, encode: Callable[..., Any]
    ) -> Callable[..., Any]:
        @functools.wraps(encode)
        def encoded(*args: Any, **kwargs: Any) -> Any:
            if any(part._forward_hooks for part in module.modules()):
                # The pipeline takes from the layers what it did not ask for.
                return encode(*args, **kwargs)
            try:
                key = (name, _content((args, kwargs)))
            except TypeError:
                return encode(*args, **kwargs)
            if key not in self._encoded:
                self._encoded[key] = encode(*args, **kwargs)
            # A pipeline may write to what it gets.
            return copy.deepcopy(self._encoded[key])

        return encoded


def first_of_each(calls: Iterable[TransformerCall]) -> dict[str, TransformerCall]:
    """The first call of each component."""
    found: dict[str, TransformerCall] = {}
    for call in calls:
        found.setdefault(call.component, call)
    return found


def _content(value: Any) -> Any:
    """Something hashable that is equal for equal arguments.

    Raises:
        TypeError: the value may change, as a random generator does.
    """
    if isinstance(value, torch.Tensor):
        numbers = value.detach().contiguous().flatten().view(torch.uint8)
        return value.shape, value.dtype, hash(numbers.numpy().tobytes())
    if isinstance(value, Mapping):
        return tuple((key, _content(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_content, value))
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return value
    raise TypeError(f"{type(value).__name__} is no plain value")
