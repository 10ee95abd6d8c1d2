"""How the rows of an image are spread over ranks or over the patches of one rank.

Rows are counted in the latents; a layer that works on a finer or coarser grid (after an
upsampling, after patchify) scales the borders to its own input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from xfuser_runtime.distributed.layout import Range
from xfuser_runtime.distributed.parallel_state import Group, get_sp_group
from xfuser_runtime.distributed.runtime_state import active_region
from xfuser_runtime.errors import InputError
from xfuser_runtime.layers.base import wrap_layer, xFuserLayerBaseWrapper

_ROWS = "_xfuser_rows"
_STREAM = "_xfuser_row_stream"


@dataclass(frozen=True)
class RowBands:
    """The image as bands of whole rows, top to bottom.

    Args:
        borders: 0, the border below each band, the last being the height.
        band: the band of this rank or this pass; None in a whole pass of `patches`, whose
            input is the whole image.
        group: the ranks, one a band, that hold the bands at the same time; None where the
            bands are patches that come one after another.

    Raises:
        InputError: a band without a row, or a number of bands that is not that of the ranks.
    """

    borders: tuple[int, ...]
    band: int | None
    group: Group | None = None

    def __post_init__(self) -> None:
        borders = self.borders
        if borders[0] != 0 or any(
            b <= a for a, b in zip(borders, borders[1:], strict=False)
        ):
            raise InputError(
                f"row borders {borders}, expected them to rise from 0, one row a band or "
                "more; use fewer ranks or patches"
            )
        if self.group is not None and (
            self.group.world_size != self.num_bands
            or self.group.rank_in_group != self.band
        ):
            raise InputError(
                f"band {self.band} of {self.num_bands} on rank {self.group.rank_in_group} of "
                f"{self.group.world_size}, expected one band a rank, in rank order"
            )

    @property
    def num_bands(self) -> int:
        return len(self.borders) - 1

    def scaled(self, rows: int) -> tuple[int, ...]:
        """The borders on the grid of an input with `rows` rows in this band.

        Raises:
            InputError: a border falls between two rows of that grid.
        """
        start, stop = self.own(self.borders)
        scaled = [border * rows for border in self.borders]
        if any(border % (stop - start) for border in scaled):
            raise InputError(
                f"{rows} rows of input in a band of {stop - start} latent rows with borders "
                f"{self.borders}, expected borders on whole rows"
            )
        return tuple(border // (stop - start) for border in scaled)

    def own(self, borders: tuple[int, ...]) -> Range:
        """The rows of this band, of all bands in a whole pass."""
        if self.band is None:
            return borders[0], borders[-1]
        return borders[self.band], borders[self.band + 1]


@contextlib.contextmanager
def row_bands(model: nn.Module, bands: RowBands | None) -> Iterator[None]:
    """Within the block all wrapped layers of `model` work on bands of rows."""
    layers = [m for m in model.modules() if isinstance(m, xFuserLayerBaseWrapper)]
    before = [vars(layer).get(_ROWS) for layer in layers]
    for layer in layers:
        vars(layer)[_ROWS] = bands
    try:
        yield
    finally:
        for layer, held in zip(layers, before, strict=True):
            vars(layer)[_ROWS] = held


def wrap_row_layer(module: nn.Module, stream: str) -> nn.Module:
    """Make a layer inside the blocks work on the rows that a rank holds of `stream`.

    Returns the same object.

    Raises:
        ValueError: no wrapper is registered for the layer.
    """
    wrap_layer(module)
    vars(module)[_STREAM] = stream
    return module


def rows_of(layer: nn.Module) -> RowBands | None:
    """The bands that a wrapped layer works on, None for whole images."""
    stream: str | None = vars(layer).get(_STREAM)
    if stream is not None:
        return _bands_of_region(stream)
    found: RowBands | None = vars(layer).get(_ROWS)
    return found


def _bands_of_region(stream: str) -> RowBands | None:
    """The rows of each rank in the block loop that is running, None where one has all.

    Raises:
        InputError: a rank without a row, or a pass over one patch.
    """
    region: Any = active_region()
    if region is None or region.whole:
        return None
    layout = region.layout
    if layout.num_patches > 1:
        raise InputError(
            f"{layout.num_patches} patches of an image that the blocks convolve, expected "
            "one; use warmup_steps >= the number of steps"
        )
    grain = next(s.grain for s in layout.segments if s.name == stream)
    borders = [0]
    for shard in range(layout.num_shards):
        borders.append(borders[-1] + layout.length((stream,), None, shard) // grain)
    return RowBands(tuple(borders), region.shard_index, get_sp_group())
