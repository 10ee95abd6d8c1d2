"""Where the parts of a rank's heads lie in memory that ranks share, and how they get there.

Shapes: B batch, S rows of all ranks, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xfuser_runtime.cuda import copy_engines
from xfuser_runtime.cuda.ways import Mover
from xfuser_runtime.distributed.layout import Range

#: Copies move this type where they can: 16 bytes in one instruction.
_WIDE = torch.complex128


def carve(flat: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Dense views one after another in flat memory."""
    views, start = [], 0
    for shape in shapes:
        numel = torch.Size(shape).numel()
        views.append(flat[start : start + numel].view(shape))
        start += numel
    return views


def rows_of_part(
    shapes: Sequence[tuple[int, int, int]],
    parts: Sequence[Range],
    index: int,
    flat: torch.Tensor,
) -> list[torch.Tensor]:
    """Where query, key and value of one part of a rank's heads lie: (B, S, part, D) each.

    Args:
        shapes: B, S and D of each.
        parts: of the heads of a rank.
        index: of the part.
        flat: the rank's workspace; all of a part lies together.
    """
    per_head = sum(batch * rows * channels for batch, rows, channels in shapes)
    start, stop = parts[index]
    whole = [(batch, rows, stop - start, channels) for batch, rows, channels in shapes]
    return carve(flat[start * per_head :], whole)


def heads_of_part(
    shape: tuple[int, int, int],
    parts: Sequence[Range],
    index: int,
    source: int,
    flat: torch.Tensor,
) -> torch.Tensor:
    """Where rank `source` puts one part of its heads of a rank's rows: (B, S_rank, part, D).

    Args:
        shape: B, S_rank and D.
        parts: of the heads of a rank.
        index: of the part.
        source: whose heads.
        flat: the workspace of the rank that reads them.
    """
    batch, rows, channels = shape
    start, stop = parts[index]
    first = source * parts[-1][1] + start
    place = flat[first * batch * rows * channels :]
    return carve(place, [(batch, rows, stop - start, channels)])[0]


def span(lengths: Sequence[int], rank: int) -> Range:
    """The rows of a rank among those of all."""
    start = sum(lengths[:rank])
    return start, start + lengths[rank]


def pack(rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each as fresh memory, by one kernel where all are alike."""
    if len({x.shape for x in rows}) > 1:
        return [x.contiguous() for x in rows]
    wide = [widened(x) for x in rows]
    views = [x for x in wide if x is not None]
    if len(views) < len(rows):
        views = list(rows)
    return list(torch.cat(views).view(rows[0].dtype).chunk(len(rows)))


def copy(target: torch.Tensor, source: torch.Tensor, mover: Mover) -> None:
    """`target.copy_(source)` by kernels, 16 bytes at a time where both lie so, or by engines."""
    if mover is Mover.ENGINES and copy_engines.copy_rows(target, source):
        return
    if mover is Mover.PACKED and len(target) > 1:
        # Each sample is one run of memory.
        for one, other in zip(target, source, strict=True):
            copy(one, other, Mover.KERNELS)
    elif target.numel():
        pair = widened(target), widened(source)
        if pair[0] is None or pair[1] is None:
            pair = target, source
        pair[0].copy_(pair[1])


def widened(x: torch.Tensor) -> torch.Tensor | None:
    """`x` as elements of 16 bytes; None where its rows do not begin and end on these."""
    width = _WIDE.itemsize // x.element_size()
    aligned = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    if x.stride(-1) != 1 or any(n % width for n in aligned):
        return None
    return x.view(_WIDE)
