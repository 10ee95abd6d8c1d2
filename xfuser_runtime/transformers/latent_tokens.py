"""How the tokens of a stream follow the latents, by what the port measured.

The latents are the transformer's first tensor.  Some of its dimensions count tokens: one
token covers a fixed extent along each of them, and the stream runs over them as a row-major
array does.  So slices along the first of them that counts more than one are runs of the
stream, and patches may cut it: frames of a video, rows of an image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

_ELSE = "use warmup_steps >= the number of steps"


@dataclass(frozen=True)
class LatentTokens:
    """The latents of one call.

    Attributes:
        shape: of what the transformer is given.
        rows: extent of a token by dimension, the one that the stream runs over last first.
        loop_shape: of its leading part that holds the denoising loop's latents; tokens of
            reference pictures may stand behind them.
    """

    shape: tuple[int, ...]
    rows: Mapping[int, int]
    loop_shape: tuple[int, ...]

    @classmethod
    def of(
        cls,
        latents: str | None,
        rows: Mapping[int, int] | None,
        shape: tuple[int, ...],
        loop_shape: tuple[int, ...],
    ) -> LatentTokens:
        """The latents of `loop_shape` in those of `shape`.

        Raises:
            ValueError: no stream follows them, they have other dimensions than the ones
                measured, tokens do not divide them, or other tokens stand between theirs.
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
        found = cls(shape, rows, loop_shape)
        if any(shape[d] != loop_shape[d] for d in rows if d != found.dim):
            raise ValueError(
                f"latents of shape {loop_shape} in ones of {shape}, expected whole rows "
                f"along dimension {found.dim} for PipeFusion; {_ELSE}"
            )
        return found

    @property
    def dim(self) -> int:
        """The dimension that patches cut: frames, or the rows of a single frame."""
        many = (d for d, step in self.rows.items() if self.shape[d] > step)
        return next(many, next(iter(self.rows)))

    @property
    def extent(self) -> int:
        """Of that dimension in the loop's latents."""
        return self.loop_shape[self.dim]

    @property
    def count(self) -> int:
        """Tokens of the loop's latents."""
        return self._tokens(self.loop_shape)

    def _tokens(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape[dim] // step for dim, step in self.rows.items())

    def segments(
        self,
        streams: Mapping[str, int],
        latents: str,
        context: str | None,
        padding: int = 0,
    ) -> tuple[dict[str, int], dict[str, tuple[str, ...]]]:
        """The latents' stream cut in segments: its own tokens, those beside, the context.

        Args:
            streams: number of tokens by stream.
            latents: the stream that holds the latents.
            context: "before" or "after": where tokens stand that are not of what the
                transformer is given; None where there are none.
            padding: how many of them stood behind in an earlier region of this call.
                Where more do now, those are a segment of their own: a token must belong
                to one patch in all regions.

        Returns:
            Number of tokens by segment, and the segments of the cut stream in order.
        """
        cut, order = {**streams, latents: self.count}, [latents]
        given = self._tokens(self.shape)
        if given > self.count:
            cut[f"{latents}.beside"] = given - self.count
            order.append(f"{latents}.beside")
        if context is not None:
            rest = f"{latents}.context"
            cut[rest] = streams[latents] - given
            if context == "after" and 0 < padding < cut[rest]:
                cut |= {f"{latents}.padding": padding, rest: cut[rest] - padding}
                order.append(f"{latents}.padding")
            order.insert(0 if context == "before" else len(order), rest)
        held = sum(cut[name] for name in order)
        if held != streams[latents]:
            raise ValueError(
                f"{streams[latents]} tokens for latents of shape {self.shape}, expected "
                f"{held} for PipeFusion; {_ELSE}"
            )
        return cut, {latents: tuple(order)} if len(order) > 1 else {}

    @property
    def tokens_of_a_row(self) -> int:
        """Tokens of one row, on whose multiples patches may end."""
        return self.count // (self.extent // self.rows[self.dim])


def loop_shape(given: torch.Tensor, latents: torch.Tensor | None) -> tuple[int, ...]:
    """Shape of the part of a transformer's latents that holds those of the loop.

    Told by the values: the loop's latents are the leading run along one dimension.

    Args:
        given: what the transformer is given; its batch may be a multiple of the loop's.
        latents: of the loop, at the same time; None where they are not known.
    """
    shape = tuple(given.shape)
    if latents is None or latents.dim() != given.dim():
        return shape
    dims = [d for d in range(1, len(shape)) if shape[d] != latents.shape[d]]
    if len(dims) != 1 or shape[dims[0]] < latents.shape[dims[0]]:
        return shape
    (dim,) = dims
    leading = given[: len(latents)].narrow(dim, 0, latents.shape[dim])
    if leading.shape != latents.shape or not torch.equal(
        leading, latents.to(given.dtype)
    ):
        return shape
    return (*shape[:dim], latents.shape[dim], *shape[dim + 1 :])


def segments_of_kinds(
    streams: Mapping[str, int],
    kinds: Mapping[str, Sequence[int]],
    num_patches: int = 1,
) -> tuple[dict[str, int], dict[str, tuple[str, ...]]]:
    """Streams with a segment for each kind of their tokens: `x.0`, `x.1`.

    Args:
        streams: number of tokens by stream.
        kinds: numbers of tokens of each kind, by stream, in their order.
        num_patches: of this call.

    Returns:
        Number of tokens by segment, and the segments of these streams in order.

    Raises:
        ValueError: the kinds are not all of a stream's tokens, or patches would cut them.
    """
    if num_patches > 1:
        raise ValueError(
            f"patches of {', '.join(kinds)}, whose blocks count their tokens, expected "
            f"whole passes; {_ELSE}"
        )
    cut: dict[str, int] = {}
    parts: dict[str, tuple[str, ...]] = {}
    for name, length in streams.items():
        counts = kinds.get(name)
        if counts is None:
            cut[name] = length
            continue
        if sum(counts) != length or min(counts) < 0:
            raise ValueError(
                f"{length} tokens of {name}, expected {' + '.join(map(str, counts))}; "
                "the port does not fit this input: run porter verify"
            )
        parts[name] = tuple(f"{name}.{index}" for index in range(len(counts)))
        cut |= dict(zip(parts[name], counts, strict=True))
    return cut, parts
