"""Records the transformer calls that a stock pipeline makes in its first step."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from porter.verify.hooks import denoisers


@dataclass(frozen=True)
class TransformerCall:
    """One call.

    Attributes:
        component: what is called.
        arguments: by parameter name.
        stepped_rows: batch of the latents that the scheduler steps afterwards.
    """

    component: str
    arguments: Mapping[str, Any]
    stepped_rows: int | None = None


class _FirstStepDone(Exception):
    """Ends the pipeline's run once the first step's calls are known.

    Args:
        rows: batch of the latents that are stepped.
    """

    def __init__(self, rows: int | None) -> None:
        super().__init__()
        self.rows = rows


def first_step_calls(
    pipeline: Any, kwargs: Mapping[str, Any], until: Collection[str] = ()
) -> tuple[TransformerCall, ...]:
    """The calls of all denoising models before the first scheduler step.

    Args:
        pipeline: the shrunken stock pipeline.
        kwargs: of the call.
        until: where one call of each of these components is enough, their names.
    """
    calls: list[TransformerCall] = []
    rows: int | None = None
    handles = []

    def enough(*_: Any) -> None:
        if until and {call.component for call in calls} >= set(until):
            raise _FirstStepDone(None)

    for name, module in denoisers(pipeline).items():
        handles.append(
            module.register_forward_pre_hook(_recorder(name, calls), with_kwargs=True)
        )
        handles.append(module.register_forward_pre_hook(enough))
    try:
        with torch.no_grad(), _stop_at_step(pipeline.scheduler):
            pipeline(**kwargs)
    except _FirstStepDone as done:
        rows = done.rows
    finally:
        for handle in handles:
            handle.remove()
    return tuple(replace(call, stepped_rows=rows) for call in calls)


def called_each_step(
    pipeline: Any, kwargs: Mapping[str, Any], names: Iterable[str]
) -> tuple[str, ...]:
    """Those of `names` that a step calls; others serve the call as a whole.

    Told by the second step: what a loop calls once at its start is called before the first.
    Where there is no second step, all of them.

    Args:
        pipeline: the shrunken stock pipeline.
        kwargs: of a call with several steps.
        names: of components that were called before the first step ended.
    """
    called: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, module in denoisers(pipeline).items()
    ]
    try:
        with torch.no_grad(), _stop_at_step(pipeline.scheduler, called):
            pipeline(**kwargs)
    except _FirstStepDone:
        return tuple(name for name in names if name in called)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(names)


def whole_run_calls(
    pipeline: Any, kwargs: Mapping[str, Any], names: Collection[str]
) -> tuple[TransformerCall, ...]:
    """All calls of the components `names` in a whole run."""
    calls: list[TransformerCall] = []
    handles = [
        module.register_forward_pre_hook(_recorder(name, calls), with_kwargs=True)
        for name, module in denoisers(pipeline).items()
        if name in names
    ]
    try:
        with torch.no_grad():
            pipeline(**kwargs)
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
def _stop_at_step(scheduler: Any, called: list[str] | None = None) -> Iterator[None]:
    """`scheduler.step` ends the run; its signature stays readable for pipelines that look.

    Args:
        scheduler: the pipeline's.
        called: names of the models called. With it the second step ends the run, and the
            first forgets them; calls of `step` with no model in between are one step.
    """
    original = scheduler.step
    number = 0

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal number
        number += bool(called)
        if called is not None and number < 2:
            called.clear()
            return original(*args, **kwargs)
        bound = inspect.signature(original).bind_partial(*args, **kwargs)
        sample = bound.arguments.get("sample")
        raise _FirstStepDone(None if sample is None else len(sample))

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step
