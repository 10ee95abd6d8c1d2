"""Which token rows a rank holds: pure integers, no tensors, no communication.

A block region works on one or more *segments* of tokens (text, image, ...). Two cuts act on them.
*Patches* (PipeFusion) cut the segments that follow the latents, on borders of whole latent rows;
segments that do not (text) belong to patch 0. *Shards* (sequence parallelism) cut the rows of each
patch of each segment into balanced contiguous pieces, so that a shard owns the same rows in a whole
pass as in the patch passes: keys and values that a whole pass cached stay valid later.

Two orders of rows matter:
    gathered whole pass   [shard][segment][patch]   what concatenating the shards' tensors gives
    key/value cache       [patch][shard][segment]   a patch pass overwrites one contiguous range

All ranges are half open, ``(start, stop)``, in rows of the segment or of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

Range = tuple[int, int]


@dataclass(frozen=True)
class Segment:
    """A run of tokens that is cut as one.

    Args:
        name: how attention call sites refer to it.
        length: number of tokens.
        row: tokens of one latent row; patch borders fall on multiples of it.
        split_by_patch: False for tokens that do not follow the latents (text): they are all in patch 0.
    """

    name: str
    length: int
    row: int = 1
    split_by_patch: bool = False

    def __post_init__(self) -> None:
        if self.length < 0 or self.row < 1:
            raise ValueError(
                f"segment {self.name!r} has length {self.length} and row {self.row},"
                " expected length >= 0 and row >= 1"
            )


@dataclass(frozen=True)
class TokenLayout:
    """The segments of a region, cut into patches and shards. Hashable.

    Args:
        segments: the runs of tokens, names unique.
        num_patches: PipeFusion patches.
        num_shards: ranks of the sequence-parallel group.
        row_borders: the patches' borders in latent rows, ``num_patches + 1`` of them; None balances
            the patches by their tokens. Regions of one step share borders, whatever their texts.

    Raises:
        ValueError: names repeat, a count is below 1, a split segment is not whole latent rows, there
            are more patches than latent rows, or the borders do not fit the rows.
    """

    segments: tuple[Segment, ...]
    num_patches: int
    num_shards: int
    row_borders: tuple[int, ...] | None = None
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

    def with_borders(self, row_borders: tuple[int, ...]) -> TokenLayout:
        """The same layout with its patches cut at ``row_borders``."""
        return replace(self, row_borders=row_borders)

    def patch_borders(self) -> tuple[int, ...]:
        """Borders of all patches in latent rows of the first segment that follows the latents.

        Raises:
            ValueError: no segment follows the latents.
        """
        for segment, borders in zip(self.segments, self._borders, strict=True):
            if segment.split_by_patch:
                return tuple(border // segment.row for border in borders)
        raise ValueError(
            f"segments {[s.name for s in self.segments]} without one that follows the latents,"
            " expected one with split_by_patch"
        )

    def patch_rows(self, patch: int) -> Range:
        """Latent token rows of ``patch``, counted as in ``patch_borders``."""
        borders = self.patch_borders()
        return borders[patch], borders[patch + 1]

    def ranges(self, name: str, patch: int | None, shard: int) -> tuple[Range, ...]:
        """Rows of segment ``name`` that ``shard`` holds in a pass over ``patch`` (None: whole pass).

        Empty ranges are left out and adjacent ones merged; the order is that of the patches.
        """
        borders = self._borders[self._index(name)]
        patches = range(self.num_patches) if patch is None else (patch,)
        merged: list[Range] = []
        for p in patches:
            start, stop = _piece(borders[p], borders[p + 1], shard, self.num_shards)
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
    count = layout.num_patches
    split = [segment for segment in layout.segments if segment.split_by_patch]
    fixed = sum(s.length for s in layout.segments if not s.split_by_patch)
    if count > 1:
        for segment in split:
            if segment.length % segment.row:
                raise ValueError(
                    f"segment {segment.name!r} has {segment.length} tokens, expected a multiple of its"
                    f" latent row of {segment.row}; patches end on whole rows"
                )
    row_borders: tuple[int, ...] = ()
    if split:
        row_borders = _checked_rows(layout, split[0]) or _balanced_rows(
            split, fixed, count
        )
    borders = []
    for segment in layout.segments:
        if not segment.split_by_patch:
            borders.append((0,) + (segment.length,) * count)
        elif count == 1:
            borders.append((0, segment.length))
        else:
            rows, main_rows = segment.length // segment.row, row_borders[-1]
            borders.append(
                tuple(b * rows // main_rows * segment.row for b in row_borders)
            )
    return tuple(borders)


def _checked_rows(layout: TokenLayout, main: Segment) -> tuple[int, ...]:
    """The layout's own row borders, () where it leaves them to be balanced."""
    borders = layout.row_borders
    if borders is None:
        return ()
    rows = main.length // main.row
    if (
        len(borders) != layout.num_patches + 1
        or (borders[0], borders[-1]) != (0, rows)
        or any(start >= stop for start, stop in pairwise(borders))
    ):
        raise ValueError(
            f"patch borders {borders}, expected {layout.num_patches + 1} rising ones from 0 to"
            f" {rows}, the latent rows of segment {main.name!r}"
        )
    return borders


def _balanced_rows(split: Sequence[Segment], fixed: int, count: int) -> tuple[int, ...]:
    """Row borders of the first split segment, patches balanced by all their tokens.

    Patch 0 also carries the ``fixed`` tokens, so it takes fewer rows, but never less than one. The
    other split segments are cut in proportion.
    """
    rows = split[0].length // split[0].row
    if count == 1:
        return 0, rows
    if count > rows:
        raise ValueError(
            f"{count} patches for {rows} latent rows, expected at most one patch a row;"
            f" set num_pipeline_patch to {rows} or less"
        )
    tokens = sum(segment.length for segment in split)
    borders = [0]
    for patch in range(count):
        left = count - patch
        todo_rows = rows - borders[-1]
        # Tokens still to give out, times rows so that all stays integer; a row has tokens / rows of them.
        carried = fixed if patch == 0 else 0
        share = todo_rows * tokens + carried * rows - left * carried * rows
        take = (2 * share + left * tokens) // (2 * left * tokens)
        borders.append(borders[-1] + min(max(take, 1), todo_rows - left + 1))
    return tuple(borders)
