"""Records the transformer calls that a stock pipeline makes in its first step."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from porter.verify.hooks import denoisers


@dataclass(frozen=True)
class TransformerCall:
    """One call of a denoiser.

    Attributes:
        component: its name in the pipeline.
        arguments: by parameter name.
        sample: what the first scheduler step takes after it; None before one is known.
    """

    component: str
    arguments: Mapping[str, Any]
    sample: torch.Tensor | None = None


class _FirstStepDone(Exception):
    """Ends the pipeline's run once the first step's calls are known.

    Attributes:
        sample: what the scheduler was given to step.
    """

    def __init__(self, sample: Any) -> None:
        super().__init__()
        self.sample = sample


def first_step_calls(
    pipeline: Any, kwargs: Mapping[str, Any]
) -> tuple[TransformerCall, ...]:
    """The calls of all denoising transformers before the first scheduler step."""
    calls: list[TransformerCall] = []
    handles = []
    for name, module in denoisers(pipeline).items():
        handles.append(
            module.register_forward_pre_hook(_recorder(name, calls), with_kwargs=True)
        )
    try:
        with torch.no_grad(), _stop_at_step(pipeline.scheduler):
            pipeline(**kwargs)
    except _FirstStepDone as done:
        if isinstance(done.sample, torch.Tensor):
            calls = [replace(call, sample=done.sample) for call in calls]
    finally:
        for handle in handles:
            handle.remove()
    return tuple(calls)


def _recorder(name: str, calls: list[TransformerCall]) -> Any:
    def record(module: nn.Module, args: Any, kwargs: Any) -> None:
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        arguments = dict(list(bound.arguments.items())[1:])
        calls.append(TransformerCall(name, copied(arguments)))

    return record


def copied(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments whose dicts and lists a `forward` may change."""
    return {
        name: type(value)(value) if type(value) in (dict, list) else value
        for name, value in arguments.items()
    }


@contextmanager
def _stop_at_step(scheduler: Any) -> Iterator[None]:
    """`scheduler.step` ends the run; its signature stays readable for pipelines that look."""
    original = scheduler.step

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind(*args, **kwargs)
        raise _FirstStepDone(bound.arguments.get("sample"))

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step
