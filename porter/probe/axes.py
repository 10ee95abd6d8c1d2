"""Solves which dimensions of a value count the tokens of which streams.

A dimension counts the tokens of some streams if its extent is the sum of their lengths in
every run.  Runs differ in image size and in text length, so equal sizes by accident are
told apart; what still cannot be told is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from porter.analysis.facts import TokenAxis
from porter.errors import Refusal

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Shape of every tensor that a run saw, by variable and path."""


class AxisSolver:
    """Token axes of the variables of one loop.

    Args:
        runs: what each run saw at the loop.
        texts: the text that each run had.
        lengths: length of each stream in every run.
        order: the streams in the order of joint sequences.
        where: `file:line` of the loop, for messages.
    """

    def __init__(
        self,
        runs: Sequence[Shapes],
        texts: Sequence[int],
        lengths: Mapping[str, tuple[int, ...]],
        order: tuple[str, ...],
        where: str,
    ) -> None:
        self._runs = runs
        self._texts = texts
        self._lengths = lengths
        self._order = order
        self._where = where

    def axes_of(self, name: str) -> tuple[TokenAxis, ...]:
        """Token axes of a variable: none, one for the whole value, or one an item.

        A variable may be missing in some runs (a mask that is made only where it masks
        something); it is solved from the runs that have it.

        Raises:
            Refusal: its axes cannot be told, or no mechanism cuts them.
        """
        paths = dict.fromkeys(path for run in self._runs for path in run.get(name, {}))
        found = {path: self._axis(name, path) for path in paths}
        distinct = set(found.values())
        if distinct <= {None}:
            return ()
        if len(distinct) == 1:
            return tuple(axis for axis in distinct if axis is not None)
        if len(distinct) == 2 and (axis := self._told_by_size(name, found)):
            return (axis,)
        items: dict[str, TokenAxis | None] = {}
        for path, axis in found.items():
            item = path.partition(".")[0]
            if not item.isdigit() or items.setdefault(item, axis) != axis:
                raise self._refusal(
                    f"value {name} whose tensors hold tokens in different ways",
                    "one token axis, or a tuple whose items have one each",
                )
        return tuple(
            replace(axis, item=int(item)) for item, axis in items.items() if axis
        )

    def _told_by_size(
        self, name: str, found: Mapping[str, TokenAxis | None]
    ) -> TokenAxis | None:
        """The axis of the tensors that have one, where all others have fewer dimensions."""
        axis = next((axis for axis in found.values() if axis is not None), None)
        fewer = all(
            len(run[name][path]) < axis.ndim
            for run in self._runs
            for path, other in found.items()
            if axis is not None and other is None and path in run.get(name, {})
        )
        if axis is None or None not in found.values() or axis.keys or not fewer:
            return None
        return replace(axis, optional=True)

    def _axis(self, name: str, path: str) -> TokenAxis | None:
        present = [i for i, run in enumerate(self._runs) if path in run.get(name, {})]
        shapes = [self._runs[i][name][path] for i in present]
        lengths = {
            s: tuple(all_[i] for i in present) for s, all_ in self._lengths.items()
        }
        found: list[TokenAxis] = []
        for dim in range(min(len(shape) for shape in shapes)):
            extents = tuple(shape[dim] for shape in shapes)
            streams = self._streams_of(name, extents, lengths)
            if streams is not None:
                found.append(TokenAxis(dim, streams, ndim=len(shapes[0])))
            elif (stream := self._repeated(extents, lengths)) is not None:
                axis = TokenAxis(dim, (stream,), ndim=len(shapes[0]), repeated=True)
                found.append(axis)
            elif self._follows_image(extents, present) and "." not in path:
                # A tuple inside a tuple may be tables that tokens look up: they stay
                # whole, and running the blocks on part of the tokens tells if they may.
                raise self._refusal(
                    f"value {name} of shapes {sorted(set(shapes))} with an image-sized "
                    "axis that is no token axis",
                    "only axes that count the streams' tokens",
                )
        if len(found) == 2:
            rows, keys = found
            if rows.streams == keys.streams and keys.dim == len(shapes[0]) - 1:
                return replace(rows, keys=keys.dim)
        if len(found) > 1:
            raise self._refusal(
                f"value {name} of shapes {sorted(set(shapes))} with {len(found)} token axes",
                "one, or two of a mask over pairs",
            )
        return found[0] if found else None

    def _streams_of(
        self,
        name: str,
        extents: tuple[int, ...],
        lengths: Mapping[str, tuple[int, ...]],
    ) -> tuple[str, ...] | None:
        """The streams whose lengths add up to `extents` in every run, in joint order."""
        if len(set(extents)) == 1:
            if lengths.get(name) == extents:
                return (name,)
            same = [stream for stream in self._order if lengths[stream] == extents]
            if name not in lengths and len(same) == 1 and extents[0] > 1:
                # A guess by size; blocks that run on a part of the tokens prove it.
                return (same[0],)
            return None
        return self.counted(extents, lengths)

    def _repeated(
        self, extents: tuple[int, ...], lengths: Mapping[str, tuple[int, ...]]
    ) -> str | None:
        """The stream of which `extents` are one multiple in every run, once a sample."""
        if len(set(extents)) == 1:
            return None
        for stream in self._order:
            times = {
                divmod(a, b) for a, b in zip(extents, lengths[stream], strict=True)
            }
            if len(times) == 1 and times <= {(n, 0) for n in range(2, 9)}:
                return stream
        return None

    def counted(
        self,
        numbers: Sequence[int | None],
        lengths: Mapping[str, tuple[int, ...]] | None = None,
    ) -> tuple[str, ...] | None:
        """The streams whose lengths add up to `numbers` in every run, in joint order."""
        lengths = self._lengths if lengths is None else lengths
        for count in range(1, len(self._order) + 1):
            for names in combinations(self._order, count):
                parts = [lengths[stream] for stream in names]
                if list(map(sum, zip(*parts, strict=True))) == list(numbers):
                    return names
        return None

    def _follows_image(self, extents: tuple[int, ...], present: Sequence[int]) -> bool:
        """True when an extent changes between runs of the same text."""
        return any(
            extents[a] != extents[b]
            for a, i in enumerate(present)
            for b, j in enumerate(present[:a])
            if self._texts[i] == self._texts[j]
        )

    def _refusal(self, found: str, expected: str) -> Refusal:
        return Refusal(found, expected=expected, where=self._where)
