"""From verdicts to proofs: what the lock keeps of a verification.

A proof is named by the ways of splitting, without degrees (`Mode.proof`), because a user
has more ranks than a verification: the runtime offers a product of several when each and
every pair of them is proven.  `cfg2` and `ring2 x ulysses2` prove `cfg` and
`ring x ulysses`; where several modes prove one name (`ulysses2`, `ulysses4`), all of those
that were verified must pass.
"""

from __future__ import annotations

from typing import Any

from porter.lock import Lock
from porter.verify.verdict import ModeVerdict, Verification


def with_verification(lock: Lock, name: str, verification: Verification) -> Lock:
    """A lock with what this verification proved, and without what it disproved.

    Args:
        lock: the lock that has the port.
        name: of the port.
        verification: of some or all of its modes; proofs of other modes stay while the
            port and the runtime are the same.
    """
    proven: dict[str, Any] = {}
    refuted: dict[str, dict[str, str]] = {}
    for proof, verdicts in _by_name(verification).items():
        wrong = [verdict for verdict in verdicts if verdict.status != "proven"]
        if wrong:
            refuted[proof] = {x.mode.name: x.explanation for x in wrong}
        right = [verdict for verdict in verdicts if verdict.status == "proven"]
        if right:
            proven[proof] = _measured(right)
    return lock.with_proofs(name, proven, refuted)


def _by_name(verification: Verification) -> dict[str, list[ModeVerdict]]:
    found: dict[str, list[ModeVerdict]] = {}
    for verdict in verification.verdicts:
        found.setdefault(verdict.mode.proof, []).append(verdict)
    return found


def _measured(verdicts: list[ModeVerdict]) -> dict[str, Any]:
    """The numbers behind one proof, by mode: two digits, so that a rerun changes little."""
    found: dict[str, Any] = {}
    for verdict in verdicts:
        worst, weakest = verdict.worst, verdict.weakest
        assert worst is not None and weakest is not None
        found[verdict.mode.name] = {
            "cases": len(verdict.measurements),
            "error": _two_digits(worst.error),
            "floor": _two_digits(worst.floor),
            "sabotage": _two_digits(weakest.error),
        }
    return found


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")
