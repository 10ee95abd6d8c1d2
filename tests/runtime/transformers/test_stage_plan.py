"""The cut of the blocks into stages: even numbers of blocks within a bound on their weights."""

from __future__ import annotations

import pytest
from torch import nn

from xfuser_runtime.transformers.stages import (
    EmptyBlock,
    StagePlan,
    drop_foreign_blocks,
    plan_stages,
)


def sizes(weights: tuple[int, ...], num_stages: int) -> list[int]:
    """Blocks of each stage."""
    plan = StagePlan((("blocks", len(weights)),), num_stages, weights)
    borders = [plan.first_block(stage) for stage in range(num_stages + 1)]
    assert (borders[0], borders[-1]) == (0, len(weights))
    return [stop - start for start, stop in zip(borders, borders[1:], strict=False)]


@pytest.mark.parametrize(
    ("weights", "num_stages", "expected"),
    [
        ((1,) * 7, 3, [3, 2, 2]),
        ((5,) * 4, 4, [1, 1, 1, 1]),
        # Two streams, then one joined stream: half the weights, not half of the blocks.
        ((340,) * 19 + (141,) * 38, 2, [18, 39]),
        ((340,) * 19 + (141,) * 38, 4, [9, 9, 20, 19]),
        # Within a twentieth of an even share the numbers of blocks decide.
        ((11, 11, 10, 10), 2, [2, 2]),
        ((100, 1, 1, 1), 2, [1, 3]),
        ((1, 1, 1, 100), 3, [2, 1, 1]),
    ],
)
def test_sizes(weights: tuple[int, ...], num_stages: int, expected: list[int]) -> None:
    assert sizes(weights, num_stages) == expected


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_no_stage_is_much_heavier_than_it_must(seed: int, num_stages: int) -> None:
    weights = tuple((seed * 7919 + i * 104729) % 97 + 1 for i in range(12))
    found = sizes(weights, num_stages)
    assert min(found) >= 1
    heaviest, start = 0, 0
    for size in found:
        heaviest = max(heaviest, sum(weights[start : start + size]))
        start += size
    share = sum(weights) / num_stages
    assert heaviest <= max(1.05 * share, share + max(weights))


def test_weights_come_from_the_blocks() -> None:
    model = nn.Module()
    model.pairs = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))
    model.joined = nn.ModuleList(nn.Linear(8, 4, bias=False) for _ in range(4))
    plan = plan_stages(model, ("pairs", "joined"), 2)
    assert plan.weights == (64, 64, 32, 32, 32, 32)
    assert [plan.stage_of("pairs", 1), plan.stage_of("joined", 0)] == [0, 1]
    foreign = drop_foreign_blocks(model, plan, 0)
    assert foreign == [f"joined.{i}" for i in range(4)]
    assert all(isinstance(block, EmptyBlock) for block in model.joined)
    assert plan_stages(model, ("pairs",), 1).weights == (64, 64)
