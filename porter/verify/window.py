"""Where the latents of a denoising loop stand in what its denoiser takes.

Pipelines that edit a picture put its tokens beside those of the latents; the denoiser's first
tensor is then longer than what the scheduler steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Window:
    """A run of the denoiser's latents along one axis.

    Attributes:
        axis: of the denoiser's latents.
        start, length: the run that holds the loop's latents.
    """

    axis: int
    start: int
    length: int

    def of(self, latents: torch.Tensor) -> torch.Tensor:
        """The loop's part of the denoiser's latents, a view."""
        return latents.narrow(self.axis, self.start, self.length)


def find_window(latents: torch.Tensor, sample: torch.Tensor | None) -> Window | None:
    """The window of a loop's latents, found by their values; None where they are all.

    Args:
        latents: what the denoiser takes; its batch may be a multiple of the sample's.
        sample: what the scheduler steps, of the same dimensions.
    """
    if sample is None or sample.dim() != latents.dim():
        return None
    axes = [
        axis
        for axis in range(1, latents.dim())
        if latents.shape[axis] != sample.shape[axis]
    ]
    if len(axes) != 1 or latents.shape[0] < sample.shape[0]:
        return None
    length, extent = sample.shape[axes[0]], latents.shape[axes[0]]
    first = latents[: sample.shape[0]]
    for start in (0, extent - length) if length < extent else ():
        window = Window(axes[0], start, length)
        if torch.equal(window.of(first), sample.to(latents.dtype)):
            return window
    return None
