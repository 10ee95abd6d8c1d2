"""Guidance branches that a stock pipeline computes together, computed one after the other.

Where a call holds a list of samples, the model pads each text to the longest of the list.  Two
CFG ranks pad each branch to its own longest, which hides behind masks on whole passes, but
shares the text out to patches otherwise: what patches see is then that of two calls.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from porter.analysis.facts import ITEMS, Axes
from porter.source import is_transformer
from porter.verify.hooks import denoisers


def computed_apart(style: str, axes: Mapping[str, int | str]) -> Axes:
    """The doubled axes of a call whose branches have lengths of their own, else none."""
    return dict(axes) if style == "batched" and ITEMS in axes.values() else {}


@contextlib.contextmanager
def branches_apart(pipeline: Any, axes: Axes, batch: int) -> Iterator[None]:
    """Inside the block each call of a transformer on both branches is two calls.

    Args:
        pipeline: the stock pipeline.
        axes: the doubled axes of the call's arguments, by path; none leaves all as it is.
        batch: number of pictures, half of those of a doubled call.
    """
    models = [m for name, m in denoisers(pipeline).items() if is_transformer(name)]
    originals = [type(model) for model in models] if axes else []
    try:
        for model, original in zip(models, originals, strict=False):
            model.__class__ = _apart(original, axes, batch)
        yield
    finally:
        for model, original in zip(models, originals, strict=False):
            model.__class__ = original


def _apart(original: type[nn.Module], axes: Axes, batch: int) -> type[nn.Module]:
    """A subclass whose call on both branches calls `original` once for each."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original.forward).bind(self, *args, **kwargs)
        arguments = dict(list(bound.arguments.items())[1:])
        lists = [path for path, axis in axes.items() if axis == ITEMS]
        if {len(arguments[path]) for path in lists} != {2 * batch}:
            return original.__call__(self, *args, **kwargs)
        halves = (slice(0, batch), slice(batch, 2 * batch))
        outputs = [
            original.__call__(self, **cut(arguments, axes, half)) for half in halves
        ]
        return _joined(*outputs)

    return type(original.__name__, (original,), {"__call__": call})


def cut(value: Any, axes: Axes, rows: slice, path: str = "") -> Any:
    """Nested arguments with their doubled axes cut to `rows`."""
    axis = axes.get(path)
    if axis == ITEMS:
        return value[rows]
    if isinstance(value, torch.Tensor):
        if not isinstance(axis, int):
            return value
        return value.narrow(axis, rows.start, rows.stop - rows.start)
    keys: Any = range(len(value)) if isinstance(value, (list, tuple)) else value
    if not isinstance(value, (list, tuple, Mapping)):
        return value
    inner = {
        key: cut(
            value[key],
            # A list whose items are alike has one axis for all.
            axes if axis is None else {f"{path}.{key}": axis},
            rows,
            f"{path}.{key}" if path else str(key),
        )
        for key in keys
    }
    return inner if isinstance(value, Mapping) else type(value)(inner.values())


def _joined(first: Any, second: Any) -> Any:
    """One output of both branches: tensors along the batch, lists one after the other."""
    if isinstance(first, torch.Tensor):
        return torch.cat([first, second])
    if isinstance(first, Mapping):
        return type(first)(**{key: _joined(first[key], second[key]) for key in first})
    if isinstance(first, list):
        return first + second
    if isinstance(first, tuple):
        pairs = zip(first, second, strict=True)
        return tuple(_joined(one, other) for one, other in pairs)
    return first
