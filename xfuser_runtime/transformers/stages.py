"""Pipeline stages of a transformer: which blocks a rank runs and what it passes on.

The module lists keep their length (upstream's code reads `len`, indices and attributes of
blocks), so foreign blocks are replaced by `EmptyBlock`s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from xfuser_runtime.distributed.collectives import P2PChannel
from xfuser_runtime.transformers.outputs import map_tensors

#: A stage's blocks may weigh this much more than an even share. Where blocks differ, even weights
#: and even work are two things: a block for two streams holds twice the weights of one for the
#: joined stream and computes the same for each token. Within the bound the split follows the work.
_SLACK = 1.05


class EmptyBlock(nn.Module):
    """Stands for a block that another stage runs: no weights, the block's plain attributes.

    Loop bodies read flags of a block (for example whether it is the last joint block)
    even where they do not run it.

    Args:
        block: the block.
        parts: dotted paths of what code outside of the loops reads of it; it is kept.
    """

    def __init__(self, block: nn.Module, parts: Sequence[str] = ()) -> None:
        super().__init__()
        for path in parts:
            _keep(self, block, path.split("."))
        for name, value in vars(block).items():
            if not name.startswith("_") and name not in ("training", "forward"):
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Never run: the region guards each block call."""
        raise RuntimeError(
            "a block of another stage was called, expected only this stage's blocks; "
            "the port is broken: run porter verify"
        )


def _keep(target: nn.Module, source: nn.Module, names: Sequence[str]) -> None:
    """Give `target` what `source` has at a path, through empty modules."""
    name, *rest = names
    value = getattr(source, name)
    if rest and isinstance(value, nn.Module):
        holder = getattr(target, name, None)
        holder = nn.Module() if holder is None else holder
        setattr(target, name, holder)
        _keep(holder, value, rest)
    else:
        setattr(target, name, value)


@dataclass(frozen=True)
class StagePlan:
    """Blocks of all loops cut into contiguous stages: as many blocks each as their weights allow.

    Attributes:
        loops: name and length of each block list, in the order in which they run.
        num_stages: number of pipeline stages.
        weights: parameters of each block, in the order in which they run; empty for equal ones.
    """

    loops: tuple[tuple[str, int], ...]
    num_stages: int
    weights: tuple[int, ...] = ()
    # First block of every stage, and the number of blocks. Derived, so not compared.
    _borders: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.num_stages > max(self.num_blocks, 1):
            raise ValueError(
                f"{self.num_stages} pipeline stages for {self.num_blocks} transformer "
                f"blocks, expected at most one stage a block; use "
                f"pipefusion_parallel_degree <= {self.num_blocks}"
            )
        weights = self.weights or (1,) * self.num_blocks
        object.__setattr__(self, "_borders", _borders(weights, self.num_stages))

    @property
    def num_blocks(self) -> int:
        """Blocks of all loops together."""
        return sum(length for _, length in self.loops)

    def first_block(self, stage: int) -> int:
        """Global index of the first block of `stage`; the number of blocks past the end."""
        return self._borders[stage]

    def stage_of(self, loop: str, index: int) -> int:
        """The stage that runs block `index` of `loop`."""
        position = self.position(loop, index)
        return max(
            stage
            for stage in range(self.num_stages)
            if self.first_block(stage) <= position
        )

    def position(self, loop: str, index: int) -> int:
        """Global index of block `index` of `loop`."""
        offset = 0
        for name, length in self.loops:
            if name == loop:
                return offset + index
            offset += length
        raise KeyError(loop)

    def reads_after(self, loop: str, stage: int) -> bool:
        """True when `stage` needs the streams after `loop`: for its own later blocks, to
        hand them over in a later loop, or to finish the output."""
        end = self.position(loop, dict(self.loops)[loop])
        is_last = stage == self.num_stages - 1
        return end > self.first_block(stage) and (
            is_last or end <= self.first_block(stage + 1)
        )


def plan_stages(model: nn.Module, loops: Iterable[str], num_stages: int) -> StagePlan:
    """The stages of a model that holds all its blocks, on any device, meta included.

    Args:
        model: the transformer.
        loops: attribute names of its block lists, in the order in which they run.
        num_stages: number of pipeline stages.
    """
    blocks = {name: list(getattr(model, name)) for name in loops}
    return StagePlan(
        tuple((name, len(held)) for name, held in blocks.items()),
        num_stages,
        tuple(
            sum(parameter.numel() for parameter in block.parameters())
            for held in blocks.values()
            for block in held
        ),
    )


def drop_foreign_blocks(
    model: nn.Module,
    plan: StagePlan,
    stage: int,
    parts: Mapping[str, Sequence[str]] | None = None,
) -> list[str]:
    """Put an `EmptyBlock` for every block of another stage; the paths of these blocks.

    Args:
        model: the transformer.
        plan: of its stages.
        stage: the one that keeps its blocks.
        parts: by a block's path, what is kept of it on every stage.
    """
    foreign = []
    for name, length in plan.loops:
        blocks = getattr(model, name)
        for index in range(length):
            if plan.stage_of(name, index) != stage:
                foreign.append(f"{name}.{index}")
                if not isinstance(blocks[index], EmptyBlock):
                    kept = (parts or {}).get(foreign[-1], ())
                    blocks[index] = EmptyBlock(blocks[index], kept)
    return foreign


def _borders(weights: tuple[int, ...], num_stages: int) -> tuple[int, ...]:
    """First block of every stage, and the number of blocks.

    Of all cuts whose heaviest stage stays within the bound, the one with the most even numbers
    of blocks; among equals the one whose early stages have more.
    """
    sums = (0, *accumulate(weights))
    count = len(weights)
    limit = max(
        _lightest_bound(sums, num_stages), _SLACK * sums[-1] / max(num_stages, 1)
    )
    # cost[i], by stages so far: of the first i blocks; start[s][i]: where stage s then begins.
    cost: list[float] = [0.0] + [float("inf")] * count
    starts: list[list[int]] = []
    for _ in range(num_stages):
        found, start = [float("inf")] * (count + 1), [0] * (count + 1)
        for end in range(1, count + 1):
            for begin in range(end):
                made = cost[begin] + (end - begin) ** 2
                if sums[end] - sums[begin] <= limit and made <= found[end]:
                    found[end], start[end] = made, begin
        cost = found
        starts.append(start)
    borders = [count]
    for start in reversed(starts):
        borders.append(start[borders[-1]])
    return tuple(reversed(borders))


def _lightest_bound(sums: Sequence[int], num_stages: int) -> float:
    """The weight of the heaviest stage in the cut where that is lightest."""
    count = len(sums) - 1
    best: list[float] = [0.0] + [float("inf")] * count
    for _ in range(num_stages):
        best = [float("inf")] + [
            min(max(best[begin], sums[end] - sums[begin]) for begin in range(end))
            for end in range(1, count + 1)
        ]
    return best[-1]


@dataclass(frozen=True)
class StageLinks:
    """The borders of one stage in one loop, and the channels to its neighbours.

    Attributes:
        plan: the blocks of all stages.
        stage: this rank's stage.
        loop: the loop that the region runs.
        channel: point-to-point channel of the stage group.
    """

    plan: StagePlan
    stage: int
    loop: str
    channel: P2PChannel

    def exchange(self, index: int, streams: Sequence[Any]) -> tuple[Any, ...]:
        """Send the streams at the next stage's first block, receive them at this one's.

        A stream that is None or has no rows in this pass does not travel.
        """
        position = self.plan.position(self.loop, index)
        if self.stage > 0 and position == self.plan.first_block(self.stage):
            return tuple(map_tensors(self._receive, stream) for stream in streams)
        is_last = self.stage == self.plan.num_stages - 1
        if not is_last and position == self.plan.first_block(self.stage + 1):
            for stream in streams:
                map_tensors(self._send, stream)
        return tuple(streams)

    def _send(self, stream: torch.Tensor) -> torch.Tensor:
        if stream.numel():
            self.channel.send(stream.contiguous(), self.stage + 1)
        return stream

    def _receive(self, stream: torch.Tensor) -> torch.Tensor:
        if not stream.numel():
            return stream
        buffer = torch.empty_like(stream, memory_format=torch.contiguous_format)
        return self.channel.recv(buffer, self.stage - 1)
