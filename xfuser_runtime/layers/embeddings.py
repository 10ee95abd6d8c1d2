"""PatchEmbed on a band of rows: the tokens of the band with the positions of the whole image.

Shapes: B batch, C channels, h rows of this band, H rows of the whole image, W columns.
"""

from __future__ import annotations

import torch
from diffusers.models.embeddings import PatchEmbed

from xfuser_runtime.errors import InputError
from xfuser_runtime.layers.base import xFuserLayerBaseWrapper
from xfuser_runtime.layers.register import xFuserLayerWrappersRegister
from xfuser_runtime.layers.rows import row_bands, rows_of


@xFuserLayerWrappersRegister.register(PatchEmbed)
class xFuserPatchEmbedWrapper(xFuserLayerBaseWrapper, PatchEmbed):
    """The position table is cropped or interpolated for the whole image, not for the band."""

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """(B, C, h, W) to the band's tokens, (B, S, D), or (B, D, h', W') unflattened.

        The band is laid into an image of zeros of the whole height, upstream embeds that, and
        the band's tokens are taken out: exact, because patches do not overlap, and whatever
        upstream does to its table is done here too.

        Raises:
            InputError: borders that are no multiples of the patch size.
        """
        bands = rows_of(self)
        if bands is None or bands.band is None:
            return super().forward(latent)
        borders = bands.scaled(latent.shape[2])
        start, stop = bands.own(borders)
        if start % self.patch_size or (stop % self.patch_size and stop != borders[-1]):
            raise InputError(
                f"rows {start} to {stop} of a band at patch size {self.patch_size}, "
                "expected multiples of the patch size"
            )
        image = latent.new_zeros((*latent.shape[:2], borders[-1], latent.shape[3]))
        image[:, :, start:stop] = latent
        # Its own convolution must see a whole image too.
        with row_bands(self, None):
            tokens = super().forward(image)
        first, last = start // self.patch_size, stop // self.patch_size
        if not self.flatten:
            return tokens[:, :, first:last]
        columns = latent.shape[3] // self.patch_size
        return tokens[:, first * columns : last * columns]
