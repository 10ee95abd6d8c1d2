"""From verdicts to proofs: what the lock keeps of a verification.

A proof is named by the ways of splitting, without degrees (`Mode.proof`), because a user
has more ranks than a verification: the runtime offers a product of several when each and
every pair of them is proven.  `cfg2` and `ulysses2 x ring2` prove `cfg` and
`ring x ulysses`; where several modes prove one name (`ulysses2`, `ulysses4`), all must pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from porter.verify.verdict import ModeVerdict, Verification


@dataclass(frozen=True)
class Proof:
    """The outcome for one name.

    Attributes:
        name: ways of splitting, for example `cfg x ulysses`.
        proven: whether every verified mode of that name is proven.
        error: the largest error of these modes.
        gate: the gate of that error.
        sabotage: the smallest error of their sabotages.
    """

    name: str
    proven: bool
    error: float
    gate: float
    sabotage: float


def proofs_of(verification: Verification) -> tuple[Proof, ...]:
    """One proof, or disproof, for each name that the verification has a verdict on."""
    by_name: dict[str, list[ModeVerdict]] = {}
    for verdict in verification.verdicts:
        by_name.setdefault(verdict.mode.proof, []).append(verdict)
    return tuple(_proof(name, verdicts) for name, verdicts in by_name.items())


def updated(proven: Iterable[str], verification: Verification) -> tuple[str, ...]:
    """The names that are proven after a verification of some modes.

    Args:
        proven: names that an earlier verification of the very same files proved.
        verification: of some or all modes; its verdicts replace earlier ones.
    """
    names = set(proven)
    for proof in proofs_of(verification):
        names.discard(proof.name)
        if proof.proven:
            names.add(proof.name)
    return tuple(sorted(names))


def _proof(name: str, verdicts: list[ModeVerdict]) -> Proof:
    worst = [v.worst for v in verdicts if v.worst is not None]
    weakest = [v.weakest for v in verdicts if v.weakest is not None]
    largest = max(worst, key=lambda m: m.error / m.gate, default=None)
    return Proof(
        name=name,
        proven=all(verdict.status == "proven" for verdict in verdicts),
        error=float("inf") if largest is None else largest.error,
        gate=0.0 if largest is None else largest.gate,
        sabotage=min((s.error for s in weakest), default=0.0),
    )
