"""Compares a tensor of a rank's run with the same tensor of the whole run.

A rank has some rows of each stream.  A tensor in its run fits when it equals the whole
run's, or the rank's part of it along one dimension that holds tokens, or whole rows of
tokens, perhaps folded with the batch.  Values decide, not extents: weights are random.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from porter.analysis.mixing import TokenCut

_CLOSE = 1e-4
"""Relative to the largest value: a rank's matrices have other shapes, so other rounding."""


@dataclass(frozen=True)
class Shard:
    """What one of the simulated ranks holds.

    Attributes:
        rows: rows of each stream, in joint order.
        lengths: tokens of each whole stream.
        grains: tokens of a row, for streams that are cut at whole rows alone.
    """

    rows: Mapping[str, tuple[int, int]]
    lengths: Mapping[str, int]
    grains: Mapping[str, int]

    def select(self, whole: torch.Tensor, cut: TokenCut) -> torch.Tensor:
        """The rank's part of a whole tensor."""
        parts, offset = [], 0
        for _ in range(cut.repeats):
            for name in cut.streams:
                unit = self._unit(name, cut)
                start, stop = self.rows[name]
                parts.append((offset + start // unit, offset + stop // unit))
                offset += self.lengths[name] // unit
        pieces = [whole.narrow(cut.dim, a, b - a) for a, b in parts]
        return torch.cat(pieces, dim=cut.dim)

    def candidates(self, whole: Sequence[int], local: Sequence[int]) -> list[TokenCut]:
        """Cuts that turn a tensor of shape `whole` into one of shape `local`.

        Those that need no repeats come first: where tokens are alike (padding, a mask of
        ones) values do not tell them from others.
        """
        if len(whole) != len(local):
            return []
        dims = [d for d, (a, b) in enumerate(zip(whole, local, strict=True)) if a != b]
        if len(dims) != 1:
            return []
        found = [
            TokenCut(dims[0], streams, rows, repeats)
            for streams, rows, total, mine in self._sums()
            if total and whole[dims[0]] % total == 0
            for repeats in [whole[dims[0]] // total]
            if mine * repeats == local[dims[0]]
        ]
        return sorted(found, key=lambda cut: cut.repeats)

    def _sums(self) -> Iterator[tuple[tuple[str, ...], bool, int, int]]:
        """Streams together, counted in tokens or rows: their extents, whole and here."""
        for count in range(1, len(self.rows) + 1):
            for names in combinations(self.rows, count):
                for rows in (False, True):
                    if rows and not all(name in self.grains for name in names):
                        continue
                    units = [self.grains[name] if rows else 1 for name in names]
                    yield (
                        names,
                        rows,
                        sum(
                            self.lengths[n] // u
                            for n, u in zip(names, units, strict=True)
                        ),
                        sum(
                            (self.rows[n][1] - self.rows[n][0]) // u
                            for n, u in zip(names, units, strict=True)
                        ),
                    )

    def _unit(self, name: str, cut: TokenCut) -> int:
        return self.grains[name] if cut.rows else 1


class Unlike(Exception):
    """A rank's tensor is no part of the whole run's."""


def cut_of(whole: torch.Tensor, local: torch.Tensor, shard: Shard) -> TokenCut | None:
    """How `local` is cut from `whole`; None where it is the whole.

    Raises:
        Unlike: it is neither.
    """
    if whole.shape == local.shape:
        if same(whole, local):
            return None
        raise Unlike
    for cut in shard.candidates(whole.shape, local.shape):
        if same(shard.select(whole, cut), local):
            return cut
    raise Unlike


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to rounding."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.numel():
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return bool(torch.equal(a, b))
    a, b = a.nan_to_num(), b.nan_to_num()
    return float((a - b).abs().amax()) <= _CLOSE * float(a.abs().amax()) + 1e-12
