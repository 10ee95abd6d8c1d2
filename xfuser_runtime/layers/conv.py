"""Conv2d on a band of rows: the halo comes from the neighbours or from the last pass.

Shapes: B batch, C channels, H rows of the whole image, h rows of this band, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from xfuser_runtime.distributed.collectives import all_to_all
from xfuser_runtime.distributed.layout import Range
from xfuser_runtime.distributed.parallel_state import Group
from xfuser_runtime.errors import InputError
from xfuser_runtime.layers.base import CallSites, xFuserLayerBaseWrapper
from xfuser_runtime.layers.register import xFuserLayerWrappersRegister
from xfuser_runtime.layers.rows import RowBands, rows_of

_STALE = "_xfuser_stale_rows"


class StaleRows:
    """The whole input of one convolution, as the latest passes left it."""

    def __init__(self) -> None:
        self.image: torch.Tensor | None = None  # (B, C, H, W)

    def reset(self) -> None:
        """Forget it."""
        self.image = None


@xFuserLayerWrappersRegister.register(nn.Conv2d)
class xFuserConv2dWrapper(xFuserLayerBaseWrapper, nn.Conv2d):
    """A convolution over the whole image from this rank's band of rows.

    Under `row_bands` with a group, the ranks exchange the rows that overlap, any number of
    bands away, in one all-to-all. Without a group the bands are patches: a whole pass
    keeps its input, a patch pass overwrites its rows and takes the rest of its halo from
    there (zeros where no pass has been), one step old.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(B, C, h, W) to (B, C', h', W'), the band's rows of the whole output.

        Raises:
            InputError: a padding that needs far rows (reflect, replicate, circular), or
                borders that are no multiples of the stride.
        """
        bands = rows_of(self)
        if bands is None:
            return super().forward(input)
        borders = bands.scaled(input.shape[2])
        needs = [self._needed_rows(borders, band) for band in range(bands.num_bands)]
        if bands.group is not None:
            rows = exchange_rows(input, borders, needs, bands.group)
            band = bands.band
        else:
            rows, band = self._stale_rows(input, borders, needs, bands)
        if band is None:
            return super().forward(input)
        return self._convolve(rows, borders[-1], needs[band])

    def _needed_rows(self, borders: tuple[int, ...], band: int) -> Range:
        """Input rows of a band's output, beyond 0 or H where it pads."""
        stride, dilation, kernel = self.stride[0], self.dilation[0], self.kernel_size[0]
        # torch keeps the padding of the last dimension first: left, right, top, bottom.
        top, bottom = self._reversed_padding_repeated_twice[2:]
        height, reach = borders[-1], dilation * (kernel - 1) + 1
        if self.padding_mode != "zeros" and (top or bottom):
            raise InputError(
                f"a convolution with padding_mode {self.padding_mode!r} on bands of rows, "
                "expected 'zeros'"
            )
        if any(border % stride for border in borders[:-1]):
            raise InputError(
                f"row borders {borders} at a convolution of stride {stride}, expected "
                "multiples of the stride"
            )
        last = (height + top + bottom - reach) // stride + 1
        first_out = borders[band] // stride
        stop_out = last if band == len(borders) - 2 else borders[band + 1] // stride
        first = first_out * stride - top
        if stop_out <= first_out:
            return first, first
        return first, (stop_out - 1) * stride - top + reach

    def _stale_rows(
        self,
        input: torch.Tensor,
        borders: tuple[int, ...],
        needs: Sequence[Range],
        bands: RowBands,
    ) -> tuple[torch.Tensor, int | None]:
        sites = self.__dict__.setdefault(_STALE, CallSites(StaleRows))
        stale: StaleRows = sites.next(bands)
        if bands.band is None:
            stale.image = input.detach().clone()
            return input, None
        shape = (*input.shape[:2], borders[-1], input.shape[3])
        if stale.image is None:
            stale.image = input.new_zeros(shape)
        if stale.image.shape != shape or stale.image.dtype != input.dtype:
            raise InputError(
                f"an image of {shape} in a patch pass, expected {tuple(stale.image.shape)} "
                "as in the pass before; run a whole pass when the batch or image changes"
            )
        start, stop = bands.own(borders)
        stale.image[:, :, start:stop] = input
        low, high = _clipped(needs[bands.band], borders[-1])
        return stale.image[:, :, low:high], bands.band

    def _convolve(self, rows: torch.Tensor, height: int, need: Range) -> torch.Tensor:
        """Convolve rows that are all there, zeros above 0 and below H."""
        if need[0] == need[1]:
            # No row of the output starts in this band; its other extents still count.
            reach = self.dilation[0] * (self.kernel_size[0] - 1) + 1
            blank = rows.new_zeros((*rows.shape[:2], reach, rows.shape[3]))
            return self._convolve(blank, reach, (0, reach))[:, :, :0]
        left, right = self._reversed_padding_repeated_twice[:2]
        above, below = max(0, -need[0]), max(0, need[1] - height)
        vertical = F.pad(rows, (0, 0, above, below)) if above or below else rows
        if self.padding_mode == "zeros":
            padded = F.pad(vertical, (left, right)) if left or right else vertical
        else:
            padded = F.pad(vertical, (left, right, 0, 0), mode=self.padding_mode)
        return F.conv2d(
            padded,
            self.weight,
            self.bias,
            self.stride,
            0,
            self.dilation,
            self.groups,
        )


def exchange_rows(
    band: torch.Tensor,
    borders: Sequence[int],
    needs: Sequence[Range],
    group: Group,
) -> torch.Tensor:
    """The rows that this rank needs, from all ranks that hold some, in one collective.

    Args:
        band: this rank's rows (B, C, h, W).
        borders: row borders of the ranks' bands.
        needs: the rows that each rank needs; what lies outside of the image is left out.
        group: the ranks.
    """
    me, ranks, height = group.rank_in_group, range(group.world_size), borders[-1]

    def overlap(holder: int, reader: int) -> Range:
        """Rows of the holder that the reader needs; the holder keeps its own."""
        low, high = _clipped(needs[reader], height)
        start = max(low, borders[holder])
        return start, max(start, min(high, borders[holder + 1]))

    def held(rows: Range) -> torch.Tensor:
        return band[:, :, rows[0] - borders[me] : rows[1] - borders[me]]

    give = [[held(overlap(me, reader))] if reader != me else [] for reader in ranks]
    shapes = []
    for holder in ranks:
        start, stop = overlap(holder, me)
        shape = (*band.shape[:2], stop - start, band.shape[3])
        shapes.append([shape] if holder != me else [])
    received = all_to_all(give, shapes, group)
    received[me] = [held(overlap(me, me))]
    return torch.cat([rows for pieces in received for rows in pieces], dim=2)


def _clipped(need: Range, height: int) -> Range:
    return max(0, need[0]), min(height, need[1])
