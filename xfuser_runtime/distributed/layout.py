"""Which token rows a rank holds: pure integers, no tensors, no communication.

A block region works on one or more *segments* of tokens (text, image, ...). Two cuts act on them.
*Patches* (PipeFusion) cut every segment into balanced contiguous pieces: those that follow the
latents on borders of whole latent rows, the others (text, reference pictures) between any two
tokens, so that all patches do the same work. *Shards* (sequence parallelism) cut the rows of each
patch of each segment again, so that a shard owns the same rows in a whole pass as in the patch
passes: keys and values that a whole pass cached stay valid later.

Two orders of rows matter:
    gathered whole pass   [shard][segment][patch]   what concatenating the shards' tensors gives
    key/value cache       [patch][shard][segment]   a patch pass overwrites one contiguous range

All ranges are half open, ``(start, stop)``, in rows of the segment or of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Range = tuple[int, int]


@dataclass(frozen=True)
class Segment:
    """A run of tokens that is cut as one.

    Args:
        name: how attention call sites refer to it.
        length: number of tokens.
        row: tokens of one latent row; patch borders fall on multiples of it.
        follows_latents: whether the tokens are those of the latents, whose rows a patch never divides.
        grain: tokens that no patch and no shard divides: those of an image row where the blocks are
            told the height.
    """

    name: str
    length: int
    row: int = 1
    follows_latents: bool = False
    grain: int = 1

    def __post_init__(self) -> None:
        if self.length < 0 or self.row < 1:
            raise ValueError(
                f"segment {self.name!r} has length {self.length} and row {self.row},"
                " expected length >= 0 and row >= 1"
            )
        if self.grain < 1 or self.length % self.grain:
            raise ValueError(
                f"segment {self.name!r} has length {self.length} and grain {self.grain}, expected"
                " whole grains"
            )


@dataclass(frozen=True)
class TokenLayout:
    """The segments of a region, cut into patches and shards. Hashable.

    Args:
        segments: the runs of tokens, names unique.
        num_patches: PipeFusion patches.
        num_shards: ranks of the sequence-parallel group.

    Raises:
        ValueError: names repeat, a count is below 1, a segment of latents is not whole latent rows, or
            there are more patches than latent rows.
    """

    segments: tuple[Segment, ...]
    num_patches: int
    num_shards: int
    # Per segment, in order: its num_patches + 1 patch borders in tokens. Derived, so not compared.
    _borders: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = [segment.name for segment in self.segments]
        if len(set(names)) != len(names):
            raise ValueError(f"segment names {names} repeat, expected each name once")
        if self.num_patches < 1 or self.num_shards < 1:
            raise ValueError(
                f"{self.num_patches} patches and {self.num_shards} shards, expected at least 1 of each"
            )
        object.__setattr__(self, "_borders", _patch_borders(self))

    def patch_borders(self) -> tuple[int, ...]:
        """Borders of all patches in latent rows of the first segment that follows the latents.

        Raises:
            ValueError: no segment follows the latents.
        """
        for segment, borders in zip(self.segments, self._borders, strict=True):
            if segment.follows_latents:
                return tuple(border // segment.row for border in borders)
        raise ValueError(
            f"segments {[s.name for s in self.segments]} without one that follows the latents,"
            " expected one with follows_latents"
        )

    def patch_rows(self, patch: int) -> Range:
        """Latent token rows of ``patch``, counted as in ``patch_borders``."""
        borders = self.patch_borders()
        return borders[patch], borders[patch + 1]

    def ranges(self, name: str, patch: int | None, shard: int) -> tuple[Range, ...]:
        """Rows of segment ``name`` that ``shard`` holds in a pass over ``patch`` (None: whole pass).

        Empty ranges are left out and adjacent ones merged; the order is that of the patches.
        """
        index = self._index(name)
        borders, grain = self._borders[index], self.segments[index].grain
        patches = range(self.num_patches) if patch is None else (patch,)
        merged: list[Range] = []
        for p in patches:
            first, last = borders[p] // grain, borders[p + 1] // grain
            start, stop = (
                edge * grain for edge in _piece(first, last, shard, self.num_shards)
            )
            if start == stop:
                continue
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], stop)
            else:
                merged.append((start, stop))
        return tuple(merged)

    def length(self, names: Sequence[str], patch: int | None, shard: int) -> int:
        """Rows that ``shard`` holds of all segments ``names`` together in this pass."""
        return sum(
            stop - start
            for name in names
            for start, stop in self.ranges(name, patch, shard)
        )

    def lengths(self, names: Sequence[str], patch: int | None) -> tuple[int, ...]:
        """``length`` of every shard, in order."""
        return tuple(self.length(names, patch, s) for s in range(self.num_shards))

    def cache_range(
        self, names: Sequence[str], patch: int | None, shards: Sequence[int]
    ) -> Range:
        """Rows of ``patch`` in a cache that holds ``shards`` of ``names`` (None: the whole cache)."""
        sizes = [
            sum(self.length(names, p, shard) for shard in shards)
            for p in range(self.num_patches)
        ]
        if patch is None:
            return 0, sum(sizes)
        start = sum(sizes[:patch])
        return start, start + sizes[patch]

    def whole_to_cache(
        self, names: Sequence[str], shards: Sequence[int]
    ) -> tuple[tuple[int, int, int], ...]:
        """Moves ``(source, destination, length)`` from gathered whole-pass order to cache order.

        The source is the concatenation over ``shards`` of what each holds in a whole pass of
        ``names``; together the moves are a bijection of its rows onto the cache's.
        """
        destination: dict[tuple[int, int, str], int] = {}
        at = 0
        for patch in range(self.num_patches):
            for position, shard in enumerate(shards):
                for name in names:
                    destination[patch, position, name] = at
                    at += self.length((name,), patch, shard)
        moves: list[tuple[int, int, int]] = []
        source = 0
        for position, shard in enumerate(shards):
            for name in names:
                for patch in range(self.num_patches):
                    size = self.length((name,), patch, shard)
                    if size:
                        _append_move(
                            moves, source, destination[patch, position, name], size
                        )
                    source += size
        return tuple(moves)

    def _index(self, name: str) -> int:
        for index, segment in enumerate(self.segments):
            if segment.name == name:
                return index
        known = ", ".join(segment.name for segment in self.segments)
        raise ValueError(
            f"segment {name!r} is not in the layout, expected one of: {known}"
        )


def _piece(start: int, stop: int, index: int, count: int) -> Range:
    """Piece ``index`` of ``count`` balanced pieces of a range; the first pieces take the remainder."""
    if not 0 <= index < count:
        raise ValueError(f"shard {index} of {count}, expected 0 to {count - 1}")
    base, extra = divmod(stop - start, count)
    first = start + index * base + min(index, extra)
    return first, first + base + (index < extra)


def _append_move(
    moves: list[tuple[int, int, int]], source: int, destination: int, length: int
) -> None:
    """Add a move, merged with the last one where both sides go on from it."""
    if moves:
        last_source, last_destination, last_length = moves[-1]
        if (
            last_source + last_length == source
            and last_destination + last_length == destination
        ):
            moves[-1] = (last_source, last_destination, last_length + length)
            return
    moves.append((source, destination, length))


def _patch_borders(layout: TokenLayout) -> tuple[tuple[int, ...], ...]:
    """Token borders of the patches, one tuple a segment."""
    main = next((s for s in layout.segments if s.follows_latents), None)
    if main is not None and main.length // main.row < layout.num_patches > 1:
        rows = main.length // main.row
        raise ValueError(
            f"{layout.num_patches} patches for {rows} latent rows, expected at most one"
            f" patch a row; set num_pipeline_patch to {rows} or less"
        )
    return tuple(
        _borders_of(segment, layout.num_patches) for segment in layout.segments
    )


def _borders_of(segment: Segment, count: int) -> tuple[int, ...]:
    """Token borders of ``count`` balanced pieces of a segment."""
    row = segment.row if segment.follows_latents and count > 1 else segment.grain
    rows, rest = divmod(segment.length, row)
    if rest or row % segment.grain:
        raise ValueError(
            f"segment {segment.name!r} has {segment.length} tokens, expected a multiple of its"
            f" latent row of {row}; patches end on whole rows"
        )
    pieces = [_piece(0, rows, patch, count) for patch in range(count)]
    return (0, *(stop * row for _, stop in pieces))
