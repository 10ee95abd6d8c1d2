from __future__ import annotations

import math

import pytest
import torch

from porter.verify.gate import gate, passes, relative_error, sabotage_shows


def test_relative_error_is_l2_over_l2() -> None:
    expected = torch.tensor([3.0, 4.0])
    found = expected + torch.tensor([0.0, 0.05])
    assert relative_error([found], [expected]) == pytest.approx(0.01, rel=1e-5)


def test_relative_error_is_that_of_the_worst_output() -> None:
    good, bad = torch.ones(4), torch.ones(4)
    assert relative_error([good, bad * 1.5], [good, bad]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "found",
    [
        [],
        [torch.ones(3)],
        [torch.ones(2), torch.ones(2)],
        [torch.tensor([1.0, math.nan])],
    ],
    ids=["none", "shape", "count", "nan"],
)
def test_what_cannot_be_compared_is_infinitely_wrong(found: list[torch.Tensor]) -> None:
    assert relative_error(found, [torch.ones(2)]) == math.inf


@pytest.mark.parametrize(
    ("floor", "expected"), [(0.0, 1e-5), (4e-7, 1e-5), (1e-6, 2e-5), (1.0, 1e-4)]
)
def test_gate_follows_the_floor_up_to_the_ceiling(
    floor: float, expected: float
) -> None:
    assert gate(floor) == pytest.approx(expected)
    assert passes(expected * 0.99, floor)
    assert not passes(expected * 1.01, floor)


def test_sabotage_must_be_thirty_gates_away() -> None:
    assert sabotage_shows(31 * 1e-5, 0.0)
    assert not sabotage_shows(29 * 1e-5, 0.0)
    assert sabotage_shows(math.inf, 0.0)
