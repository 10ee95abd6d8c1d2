"""How the tokens of a stream follow the latents, by what the port measured.

The latents are the transformer's first tensor.  Some of its dimensions count tokens: one
token covers a fixed extent along each of them, and the stream runs over them as a row-major
array does.  So slices along the first of them that counts more than one are runs of the
stream, and patches may cut it: frames of a video, rows of an image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

_ELSE = "use warmup_steps >= the number of steps"


@dataclass(frozen=True)
class LatentTokens:
    """The latents of one call.

    Attributes:
        shape: of the latents.
        rows: extent of a token by dimension, the one that the stream runs over last first.
    """

    shape: tuple[int, ...]
    rows: Mapping[int, int]

    @classmethod
    def of(
        cls, latents: str | None, rows: Mapping[int, int] | None, shape: tuple[int, ...]
    ) -> LatentTokens:
        """The latents of `shape`.

        Raises:
            ValueError: no stream follows them, they have other dimensions than the ones
                measured, or tokens do not divide them.
        """
        if latents is None or not rows:
            raise ValueError(
                "no token stream that follows the rows of the latents, expected one for "
                f"PipeFusion; {_ELSE}"
            )
        if len(shape) <= max(rows) or any(shape[d] % step for d, step in rows.items()):
            raise ValueError(
                f"latents of shape {shape}, expected tokens of {dict(rows)} elements by "
                f"dimension for PipeFusion; {_ELSE}"
            )
        return cls(shape, rows)

    @property
    def dim(self) -> int:
        """The dimension that patches cut: frames, or the rows of a single frame."""
        many = (d for d, step in self.rows.items() if self.shape[d] > step)
        return next(many, next(iter(self.rows)))

    @property
    def extent(self) -> int:
        """Of that dimension."""
        return self.shape[self.dim]

    @property
    def count(self) -> int:
        """Tokens of the latents."""
        return math.prod(self.shape[dim] // step for dim, step in self.rows.items())

    def without_context(
        self, streams: Mapping[str, int], latents: str, context: str
    ) -> tuple[dict[str, int], dict[str, tuple[str, ...]]]:
        """The latents' stream cut in two segments: its own tokens and the context.

        Args:
            streams: number of tokens by stream.
            latents: the stream that holds the latents.
            context: "before" or "after": where its other tokens stand.

        Returns:
            Number of tokens by segment, and the segments of the cut stream in order.
        """
        rest = f"{latents}.context"
        cut = {**streams, latents: self.count, rest: streams[latents] - self.count}
        parts = (rest, latents) if context == "before" else (latents, rest)
        return cut, {latents: parts}

    def tokens_of_a_row(self, streams: Mapping[str, int], latents: str | None) -> int:
        """Tokens of one row, on whose multiples patches may end.

        Raises:
            ValueError: the stream does not hold the tokens of the latents.
        """
        held = streams[latents or ""]
        if held != self.count:
            raise ValueError(
                f"{held} tokens for latents of shape {self.shape}, expected {self.count} "
                f"for PipeFusion; {_ELSE}"
            )
        return self.count // (self.extent // self.rows[self.dim])
