"""How guidance reaches the transformer: one doubled call, two calls, or none.

Which axes are doubled is measured at batch sizes 1, 2 and 3 with guidance on and off: an
axis counts as doubled only if it has 2B rows with guidance and B without at every B.  A
list counts as doubled if it has 2B items with guidance and B without.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from porter.analysis.facts import ITEMS
from porter.probe.capture import (
    TransformerCall,
    first_step_calls,
)
from porter.probe.leaves import leaf_shapes
from porter.source import is_transformer

BATCHES = (1, 2, 3)
KwargsOf = Callable[..., Mapping[str, Any]]
Axes = dict[str, int | str]
#: The calls of one step, in order.
_Calls = Sequence[TransformerCall]
#: Values of one argument, one a batch size, with guidance and without.
_Values = Sequence[Any]


def measure_guidance(
    pipeline: Any, kwargs_of: KwargsOf, batches: Sequence[int] = BATCHES
) -> tuple[str, Axes]:
    """The style of guidance of the transformers' calls and, for a batched call, the doubled axes.

    Args:
        pipeline: the shrunken stock pipeline.
        kwargs_of: makes call arguments from `batch_size` and `guidance`.
        batches: what `batch_size` to ask for, 1 first.

    Returns:
        ("batched", axes by argument path), ("sequential", {}), ("carried", {}) where the
        scheduler steps both branches, ("padded", {}) where tensors are as long as the
        longest item of a list of both branches, or ("none", {}) where nothing is doubled or stock
        does not run with one prompt.
    """
    on: dict[int, tuple[TransformerCall, ...]] = {}
    off: dict[int, tuple[TransformerCall, ...]] = {}
    for batch in batches:
        try:
            guided = _calls(pipeline, kwargs_of, batch, True)
            off[batch] = _calls(pipeline, kwargs_of, batch, False)
        except (RuntimeError, ValueError, TypeError, IndexError):
            # Stock itself fails at this batch size.
            continue
        on[batch] = guided
        if batch == batches[0] and _makes_two_calls(on[batch], off[batch]):
            return "sequential", {}
    if batches[0] not in on or any(_counted(on[b]) != _counted(off[b]) for b in on):
        return "none", {}
    axes = _doubled_axes(on, off)
    if axes and any(on[b][-1].stepped_rows == 2 * b for b in on):
        return "carried", {}
    if ITEMS in axes.values() and _has_padded(axes, on[batches[0]][-1].arguments):
        return "padded", {}
    return ("batched", axes) if axes else ("none", {})


def _doubled_axes(on: Mapping[int, _Calls], off: Mapping[int, _Calls]) -> Axes:
    """The doubled axes of the one call of a step that has any, by batch size.

    Further calls on one branch alone may stand before or behind it.
    """
    batches = tuple(on)
    for place in reversed(range(len(on[batches[0]]))):
        guided = [on[b][place].arguments for b in batches]
        plain = [off[b][place].arguments for b in batches]
        axes = _Doubling(batches).axes("", guided, plain)
        if not axes and len(on) > 1 and all(on[b][-1].stepped_rows == b for b in on):
            # Some guide at any scale: the call has twice the rows that the scheduler steps.
            always = _Doubling(batches, always=True)
            axes = always.axes("", guided, [None] * len(batches))
        if axes:
            return axes
    return {}


def _has_padded(axes: Axes, arguments: Mapping[str, Any]) -> bool:
    """Whether tensors of tokens come with a list, whose items may differ in length.

    They are as long as the longest item of both branches, whatever a rank has of them.
    """
    shapes = leaf_shapes(arguments)
    return any(len(shapes.get(path, ())) > 2 for path in axes)


def _makes_two_calls(
    on: Sequence[TransformerCall], off: Sequence[TransformerCall]
) -> bool:
    """Whether a guided step makes two calls of one module, or one each of two modules.

    Some pipelines guide at any scale, by a second call without a guard.
    """
    guided, plain = _counted(on), _counted(off)
    return any(
        count == 2 and plain[name] in (1, 2) for name, count in guided.items()
    ) or (len(on) == 2 and len(guided) == 2 and guided == plain)


def _counted(calls: Sequence[TransformerCall]) -> Counter[str]:
    return Counter(call.component for call in calls)


def _calls(
    pipeline: Any, kwargs_of: KwargsOf, batch: int, guidance: bool
) -> tuple[TransformerCall, ...]:
    calls = first_step_calls(pipeline, kwargs_of(batch_size=batch, guidance=guidance))
    return tuple(call for call in calls if is_transformer(call.component))


class _Doubling:
    """Finds doubled axes in nested arguments.

    Args:
        batches: the batch sizes of the calls.
        always: there are no calls without guidance.
    """

    def __init__(self, batches: Sequence[int], *, always: bool = False) -> None:
        self._batches = batches
        self._always = always

    def axes(self, path: str, on: _Values, off: _Values) -> Axes:
        """Doubled axes: on[k] and off[k] are an argument's values at batch size k.

        A value may be missing (None) in some calls, as a mask of padded texts is, if two
        calls with guidance and one without have it.
        """
        every = [value for value in (*on, *off) if value is not None]
        needed = min(2, len(self._batches))
        missing = all(v is None for v in off) and not self._always
        if sum(v is not None for v in on) < needed or missing:
            return {}
        if all(isinstance(value, torch.Tensor) for value in every):
            axis = self._axis([_shape(v) for v in on], [_shape(v) for v in off])
            return {} if axis is None else {path: axis}
        if all(isinstance(value, Mapping) for value in every):
            keys = dict.fromkeys(key for value in every for key in value)
            return self._joined(path, list(keys), on, off)
        if all(isinstance(value, (list, tuple)) for value in every):
            return self._of_list(path, on, off, {len(value) for value in every})
        return {}

    def _of_list(self, path: str, on: _Values, off: _Values, lengths: set[int]) -> Axes:
        if self._is_doubled([_length(v) for v in on], [_length(v) for v in off]):
            return {path: ITEMS}
        if len(lengths) > 1:
            return {}
        (length,) = lengths
        found = self._joined(path, range(length), on, off)
        kinds = set(found.values())
        # The items of a list are most often alike: then its name stands for all.
        alike = len(found) == length and len(kinds) == 1
        return {path: kinds.pop()} if alike else found

    def _joined(
        self, path: str, keys: Sequence[Any], on: _Values, off: _Values
    ) -> Axes:
        found: Axes = {}
        for key in keys:
            inner = f"{path}.{key}" if path else str(key)
            found |= self.axes(
                inner, [_item(v, key) for v in on], [_item(v, key) for v in off]
            )
        return found

    def _axis(
        self,
        on: Sequence[tuple[int, ...] | None],
        off: Sequence[tuple[int, ...] | None],
    ) -> int | None:
        dims = min(len(shape) for shape in (*on, *off) if shape is not None)
        for axis in range(dims):
            if self._is_doubled(
                [_item(shape, axis) for shape in on],
                [_item(shape, axis) for shape in off],
            ):
                return axis
        return None

    def _is_doubled(self, on: Sequence[int | None], off: Sequence[int | None]) -> bool:
        """True for 2B rows with guidance and B without, wherever there is a value."""
        return all(
            two in (None, 2 * batch) and one in (None, batch)
            for batch, two, one in zip(self._batches, on, off, strict=True)
        )


def _shape(value: Any) -> tuple[int, ...] | None:
    return None if value is None else tuple(value.shape)


def _length(value: Any) -> int | None:
    return None if value is None else len(value)


def _item(value: Any, key: Any) -> Any:
    if value is None or (isinstance(value, Mapping) and key not in value):
        return None
    return value[key]
