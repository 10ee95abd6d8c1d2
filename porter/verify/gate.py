"""The arithmetic of a verdict: error, floor, gate and what a sabotage must reach.

All errors are relative L2 distances of final latents.  The gate is relative to the model's
own rounding: the floor is the distance that stock diffusers has from itself when only the
order of its attention keys changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

#: No gate is tighter than this: fp32 over eight guided steps.
SMALLEST_GATE = 1e-5
#: A port may be this many floors away from stock.
FLOORS = 20.0
#: Whatever the floor, no error above this one passes.
CEILING = 1e-4
#: A sabotage must be this many gates away, or the case is too dull to prove anything.
SABOTAGE_GATES = 30.0


def relative_error(
    found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]
) -> float:
    """The largest relative L2 distance over the outputs of one call.

    Infinite where the number of outputs, a shape, or a value (NaN, inf) is wrong.
    """
    if len(found) != len(expected) or not expected:
        return math.inf
    return max(_distance(a, b) for a, b in zip(found, expected, strict=True))


def gate(floor: float) -> float:
    """The largest error that passes for a model with this floor."""
    return min(max(SMALLEST_GATE, FLOORS * floor), CEILING)


def passes(error: float, floor: float) -> bool:
    """True when the error is within the gate of the floor."""
    return error <= gate(floor)


def sabotage_shows(error: float, floor: float) -> bool:
    """True when a sabotaged run is so far off that the gate cannot have missed it."""
    return error >= SABOTAGE_GATES * gate(floor)


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        return math.inf
    a, b = found.double(), expected.double()
    distance = torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)
    value = float(distance)
    return value if math.isfinite(value) else math.inf
