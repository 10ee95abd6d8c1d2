"""How guidance reaches the transformer: one doubled call, two calls, or none.

Which axes are doubled is measured at batch sizes 1, 2 and 3 with guidance on and off: an
axis counts as doubled only if it has 2B rows with guidance and B without at every B.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from porter.probe.capture import TransformerCall, first_step_calls
from porter.probe.leaves import leaf_shapes

BATCHES = (1, 2, 3)
KwargsOf = Callable[..., Mapping[str, Any]]


def measure_guidance(pipeline: Any, kwargs_of: KwargsOf) -> tuple[str, dict[str, int]]:
    """The style of guidance and, for a batched call, the doubled axes.

    Args:
        pipeline: the shrunken stock pipeline.
        kwargs_of: makes call arguments from `batch_size` and `guidance`.

    Returns:
        ("batched", axes by argument path), ("sequential", {}), or ("none", {}) where
        nothing is doubled or stock does not run at all of these batch sizes.
    """
    try:
        on = {b: _calls(pipeline, kwargs_of, b, True) for b in BATCHES}
        off = {b: _calls(pipeline, kwargs_of, b, False) for b in BATCHES}
    except (RuntimeError, ValueError, TypeError, IndexError):
        # Stock itself fails at some batch size: which axes are doubled cannot be told.
        return "none", {}
    if all(len(on[b]) == 2 * len(off[b]) for b in BATCHES):
        return "sequential", {}
    if any(len(on[b]) != 1 or len(off[b]) != 1 for b in BATCHES):
        return "none", {}
    axes = _doubled_axes(
        {b: leaf_shapes(on[b][0].arguments) for b in BATCHES},
        {b: leaf_shapes(off[b][0].arguments) for b in BATCHES},
    )
    return ("batched", axes) if axes else ("none", {})


def _calls(
    pipeline: Any, kwargs_of: KwargsOf, batch: int, guidance: bool
) -> tuple[TransformerCall, ...]:
    return first_step_calls(pipeline, kwargs_of(batch_size=batch, guidance=guidance))


def _doubled_axes(
    on: Mapping[int, Mapping[str, tuple[int, ...]]],
    off: Mapping[int, Mapping[str, tuple[int, ...]]],
) -> dict[str, int]:
    axes: dict[str, int] = {}
    for path, shape in on[BATCHES[0]].items():
        if not all(path in on[b] and path in off[b] for b in BATCHES):
            continue
        for axis in range(len(shape)):
            if all(
                len(on[b][path]) > axis
                and len(off[b][path]) > axis
                and on[b][path][axis] == 2 * b
                and off[b][path][axis] == b
                for b in BATCHES
            ):
                axes[path] = axis
                break
    return axes
