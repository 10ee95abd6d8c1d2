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
from porter.probe.capture import TransformerCall, first_step_calls

BATCHES = (1, 2, 3)
KwargsOf = Callable[..., Mapping[str, Any]]
Axes = dict[str, int | str]
#: Values of one argument, one a batch size, with guidance and without.
_Values = Sequence[Any]


def measure_guidance(pipeline: Any, kwargs_of: KwargsOf) -> tuple[str, Axes]:
    """The style of guidance and, for a batched call, the doubled axes.

    Args:
        pipeline: the shrunken stock pipeline.
        kwargs_of: makes call arguments from `batch_size` and `guidance`.

    Returns:
        ("batched", axes by argument path), ("sequential", {}), or ("none", {}) where
        nothing is doubled or stock does not run at all of these batch sizes.
    """
    try:
        on = {BATCHES[0]: _calls(pipeline, kwargs_of, BATCHES[0], True)}
        off = {BATCHES[0]: _calls(pipeline, kwargs_of, BATCHES[0], False)}
        if _makes_two_calls(on[BATCHES[0]], off[BATCHES[0]]):
            return "sequential", {}
        for batch in BATCHES[1:]:
            on[batch] = _calls(pipeline, kwargs_of, batch, True)
            off[batch] = _calls(pipeline, kwargs_of, batch, False)
    except (RuntimeError, ValueError, TypeError, IndexError):
        # Stock itself fails at some batch size: which axes are doubled cannot be told.
        return "none", {}
    if any(_counted(on[b]) != _counted(off[b]) for b in BATCHES):
        return "none", {}
    # What the step is made of: a ControlNet, say, is called before.
    axes = _doubled(
        "",
        [on[b][-1].arguments for b in BATCHES],
        [off[b][-1].arguments for b in BATCHES],
    )
    return ("batched", axes) if axes else ("none", {})


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
    return first_step_calls(pipeline, kwargs_of(batch_size=batch, guidance=guidance))


def _doubled(path: str, on: _Values, off: _Values) -> Axes:
    """Doubled axes in a nested argument: on[k] and off[k] are its values at BATCHES[k]."""
    every = [*on, *off]
    if all(isinstance(value, torch.Tensor) for value in every):
        axis = _doubled_axis([v.shape for v in on], [v.shape for v in off])
        return {} if axis is None else {path: axis}
    if all(isinstance(value, Mapping) for value in every):
        keys = [k for k in on[0] if all(k in value for value in every)]
        return _joined(path, keys, on, off)
    if all(isinstance(value, (list, tuple)) for value in every):
        if _is_doubled([len(v) for v in on], [len(v) for v in off]):
            return {path: ITEMS}
        if len({len(value) for value in every}) == 1:
            found = _joined(path, range(len(on[0])), on, off)
            kinds = set(found.values())
            # The items of a list are most often alike: then its name stands for all.
            return (
                {path: kinds.pop()}
                if len(found) == len(on[0]) and len(kinds) == 1
                else found
            )
    return {}


def _joined(path: str, keys: Sequence[Any], on: _Values, off: _Values) -> Axes:
    found: Axes = {}
    for key in keys:
        inner = f"{path}.{key}" if path else str(key)
        found |= _doubled(inner, [v[key] for v in on], [v[key] for v in off])
    return found


def _doubled_axis(
    on: Sequence[tuple[int, ...]], off: Sequence[tuple[int, ...]]
) -> int | None:
    dims = min(len(shape) for shape in (*on, *off))
    for axis in range(dims):
        if _is_doubled([shape[axis] for shape in on], [shape[axis] for shape in off]):
            return axis
    return None


def _is_doubled(on: Sequence[int], off: Sequence[int]) -> bool:
    return all(
        (two, one) == (2 * batch, batch)
        for batch, two, one in zip(BATCHES, on, off, strict=True)
    )
