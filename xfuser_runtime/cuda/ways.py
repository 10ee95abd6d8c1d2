"""Ways for heads to travel between GPUs that share memory, and which of them is fastest here.

How many parts the heads are cut into, and whether kernels or copy engines move them, decides how
much of the exchange hides behind attention. No rule foretells it: on CUDA the ways are timed at
the first call of a shape, in a CUDA graph as they run later, and all ranks agree on one.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, product

import torch

from xfuser_runtime.cuda.timing import agrees, seconds_in_graph
from xfuser_runtime.distributed.collectives import all_reduce_max
from xfuser_runtime.distributed.layout import Range
from xfuser_runtime.distributed.parallel_state import Group

logger = logging.getLogger(__name__)

_DEVICE = "cuda"


class Mover(enum.Enum):
    """What moves rows: each costs something else of what the multiprocessors do meanwhile.

    Attributes:
        KERNELS: kernels write them row by row.
        PACKED: a kernel packs them into one run of memory, which copy engines move.
        ENGINES: copy engines move them row by row.
    """

    KERNELS = "kernels"
    PACKED = "packed"
    ENGINES = "engines"


@dataclass(frozen=True)
class Way:
    """One way.

    Args:
        shares: of the heads of a rank, in the order in which they travel: one part travels while
            the one before is computed. What comes first and last is not hidden.
        mover: what moves them.
    """

    shares: tuple[int, ...] = (1, 1)
    mover: Mover = Mover.KERNELS

    @property
    def name(self) -> str:
        """For reports: `1:2:1 packed`."""
        told = "" if self.mover is Mover.KERNELS else f" {self.mover.value}"
        return ":".join(map(str, self.shares)) + told


#: The ways that are timed. With small first and last parts less is left bare.
WAYS = tuple(
    Way(shares, mover)
    for shares, mover in product(
        ((1,), (1, 1), (1, 2, 1), (1,) * 4, (1,) * 6, (1, 2, 3, 3, 2, 1)), Mover
    )
)


def head_parts(count: int, shares: Sequence[int]) -> list[Range]:
    """The heads 0 to `count` in ranges as `shares`, none of them empty."""
    ends = [count * end // sum(shares) for end in accumulate(shares)]
    pairs = zip([0, *ends], ends, strict=False)
    return [(start, stop) for start, stop in pairs if stop > start]


def different(ways: Sequence[Way], count: int) -> list[Way]:
    """The ways that cut `count` heads differently."""
    found = {(tuple(head_parts(count, w.shares)), w.mover): w for w in reversed(ways)}
    return [way for way in ways if way in found.values()]


def fastest(
    run: Callable[[Way], torch.Tensor], ways: Sequence[Way], group: Group
) -> Way:
    """The way whose slowest rank is done first; a collective call on CUDA.

    Args:
        run: the whole call by a way. One that does not return what the first way does counts
            as one that cannot be taken.
        ways: to choose from.
        group: the ranks that make the call together.
    """
    expected = run(ways[0])
    times = [_seconds(run, way, group, expected) for way in ways]
    own = torch.tensor(times, device=_DEVICE)
    slowest = all_reduce_max(own, group).tolist()
    chosen = ways[slowest.index(min(slowest))]
    told = ", ".join(
        f"{way.name} {seconds * 1e6:.0f} us"
        for way, seconds in zip(ways, slowest, strict=True)
    )
    logger.info("heads travel by %s (%s)", chosen.name, told)
    return chosen


def _seconds(
    run: Callable[[Way], torch.Tensor], way: Way, group: Group, expected: torch.Tensor
) -> float:
    """Of one call in a CUDA graph; infinite where the way cannot be captured or is wrong."""
    # All ranks make the same calls whatever they find, or one would wait for another.
    outputs = [run(way) for _ in range(2)]
    is_right = all(agrees(output, expected) for output in outputs)
    del outputs
    try:
        seconds = seconds_in_graph(
            lambda: run(way),
            lambda: torch.distributed.barrier(group=group.process_group),
        )
    except RuntimeError as error:
        logger.warning("heads cannot travel by %s: %s", way.name, error)
        return float("inf")
    if not is_right:
        logger.warning("heads that travel by %s give another result", way.name)
    return seconds if is_right else float("inf")
