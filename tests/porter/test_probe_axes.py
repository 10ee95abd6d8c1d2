"""Token axes of nested values: items of a tuple that are tuples themselves."""

from __future__ import annotations

import pytest

from porter.errors import Refusal
from porter.probe.axes import AxisSolver, Shapes

_SIZES = ((5, 4, 6), (5, 3, 7), (5, 8, 2))


def _solver(runs: list[Shapes]) -> AxisSolver:
    lengths = tuple(f * h * w for f, h, w in _SIZES)
    return AxisSolver(runs, [0] * len(_SIZES), {"x": lengths}, ("x",), "toy.py:1")


def test_tables_that_tokens_look_up_stay_whole() -> None:
    runs: list[Shapes] = [
        {
            "rope": {
                "0.0": (h, 8),
                "0.1": (w, 8),
                "1.0": (1, f * h * w),
                "1.1": (1, f * h * w),
            }
        }
        for f, h, w in _SIZES
    ]
    (axis,) = _solver(runs).axes_of("rope")
    assert (axis.item, axis.dim, axis.streams) == (1, 1, ("x",))


def test_a_bare_table_of_the_image_is_refused() -> None:
    runs: list[Shapes] = [{"rope": {"": (h, 8)}} for _, h, _ in _SIZES]
    with pytest.raises(Refusal, match="an image-sized axis that is no token axis"):
        _solver(runs).axes_of("rope")


def test_an_item_with_two_kinds_of_tensors_is_refused() -> None:
    runs: list[Shapes] = [
        {"rope": {"0.0": (h, 8), "0.1": (1, f * h * w), "1.0": (4, 8)}}
        for f, h, w in _SIZES
    ]
    with pytest.raises(Refusal, match="hold tokens in different ways"):
        _solver(runs).axes_of("rope")


def test_tensors_of_fewer_dimensions_than_those_of_tokens_stay_whole() -> None:
    runs: list[Shapes] = [
        {"hints": {"0.0": (1, f * h * w, 8), "0.1": (), "1.0": (1, f * h * w, 8)}}
        for f, h, w in _SIZES
    ]
    (axis,) = _solver(runs).axes_of("hints")
    assert (axis.dim, axis.item, axis.ndim, axis.optional) == (1, None, 3, True)


def test_a_dimension_may_hold_the_tokens_of_each_sample() -> None:
    runs: list[Shapes] = [{"mod": {"": (2 * f * h * w, 8)}} for f, h, w in _SIZES]
    (axis,) = _solver(runs).axes_of("mod")
    assert (axis.dim, axis.streams, axis.repeated) == (0, ("x",), True)


def test_a_multiple_that_changes_is_no_number_of_samples() -> None:
    runs: list[Shapes] = [{"mod": {"": (f * h * w * h, 8)}} for f, h, w in _SIZES]
    with pytest.raises(Refusal, match="an image-sized axis that is no token axis"):
        _solver(runs).axes_of("mod")
