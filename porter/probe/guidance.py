"""How guidance reaches the transformer: one doubled call, two calls, or none.

Which axes are doubled is measured at batch sizes 1 and 2 with guidance on and off: an axis
counts as doubled only if it has 2B rows with guidance and B without at both, and two points
make a line.  A list counts as doubled if it has 2B items with guidance and B without.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from porter.analysis.facts import ITEMS, Axes
from porter.probe.capture import TransformerCall
from porter.probe.halves import halves_agree
from porter.probe.leaves import leaf_shapes
from porter.source import is_transformer

BATCHES = (1, 2)
CallsOf = Callable[..., tuple[TransformerCall, ...]]
"""The calls of the first step, from `batch_size`, `guidance` and `text`."""
#: Calls of one step by batch size.
_Calls = dict[int, tuple[TransformerCall, ...]]
#: Values of one argument, one a batch size, with guidance and without.
_Values = Sequence[Any]


@dataclass(frozen=True)
class Guidance:
    """How guidance reaches the transformers: the fields of `PipelineFacts` of these names."""

    style: str
    axes: Axes = field(default_factory=dict)
    helper_axes: Mapping[str, Axes] = field(default_factory=dict)


def measure_guidance(
    pipeline: Any, calls_of: CallsOf, batches: Sequence[int] = BATCHES
) -> Guidance:
    """The style of guidance of the transformers' calls and, for a batched call, the doubled axes.

    Args:
        pipeline: the shrunken stock pipeline.
        calls_of: runs the first step.
        batches: what `batch_size` to ask for, 1 first.

    Returns:
        Its style is "batched"; "carried" where the scheduler steps both branches;
        "padded" where each branch alone gives another result, since tensors are as long as
        the longest item of a list of both branches; "coupled" where it does so for another
        reason, as a row that is read for all; "sequential"; "single" where a guided
        step calls the transformer as any other does; "none" where nothing is doubled or
        stock does not run with one prompt.
    """
    on: _Calls = {}
    off: _Calls = {}
    for batch in batches:
        try:
            guided = calls_of(batch_size=batch, guidance=True)
            off[batch] = calls_of(batch_size=batch, guidance=False)
        except (RuntimeError, ValueError, TypeError, IndexError):
            # Stock itself fails at this batch size.
            continue
        on[batch] = guided
        if batch == batches[0] and _makes_two_calls(
            _of_transformers(guided), _of_transformers(off[batch])
        ):
            return Guidance("sequential")
    helpers = {
        c.component for b in on for c in on[b] if not is_transformer(c.component)
    }
    helper_axes = {name: _doubled(*_only(name, on, off)) for name in sorted(helpers)}
    on, off = (
        {batch: _of_transformers(calls[batch]) for batch in on} for calls in (on, off)
    )
    if batches[0] not in on or any(_counted(on[b]) != _counted(off[b]) for b in on):
        return Guidance("none")
    axes = _doubled(on, off)
    if not axes:
        alike = all(_shapes(on[batch]) == _shapes(off[batch]) for batch in on)
        return Guidance("single" if alike else "none")
    if any(on[b][-1].stepped_rows == 2 * b for b in on):
        return Guidance("carried", axes)
    if ITEMS in axes.values():
        longer = {b: calls_of(batch_size=b, guidance=True, text=1) for b in on}
        if not _halves_agree(pipeline, axes, on, longer):
            return Guidance("padded", axes, {n: a for n, a in helper_axes.items() if a})
    elif not _halves_agree(pipeline, axes, {max(on): on[max(on)]}):
        return Guidance("coupled", axes)
    return Guidance("batched", axes)


def _halves_agree(pipeline: Any, axes: Axes, *every: _Calls) -> bool:
    """Whether each branch of all these calls can be computed alone."""
    return all(
        halves_agree(pipeline.components[call.component], call.arguments, axes, batch)
        for found in every
        for batch, calls in found.items()
        for call in _of_transformers(calls)
    )


def _doubled(on: _Calls, off: _Calls) -> Axes:
    """The doubled axes of the one call of a step that has any, by batch size.

    Further calls on one branch alone may stand before or behind it.
    """
    batches = tuple(on)
    for place in reversed(range(len(on[batches[0]]) if batches else 0)):
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


def _only(component: str, *every: _Calls) -> tuple[_Calls, ...]:
    """The calls of one component; none where their number differs."""
    found = [
        {
            b: tuple(c for c in calls if c.component == component)
            for b, calls in of.items()
        }
        for of in every
    ]
    counts = {len(of[b]) for of in found for b in of}
    batches = list(found[0]) if len(counts) == 1 else []
    return tuple({b: of[b] for b in batches} for of in found)


def _of_transformers(calls: Sequence[TransformerCall]) -> tuple[TransformerCall, ...]:
    return tuple(call for call in calls if is_transformer(call.component))


def _shapes(calls: Sequence[TransformerCall]) -> list[Any]:
    return [(call.component, leaf_shapes(call.arguments)) for call in calls]


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
