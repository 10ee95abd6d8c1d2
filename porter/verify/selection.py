"""Which modes of a port a verification takes."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from porter.errors import PorterError
from porter.lock import proof_key
from porter.verify.cases import PLAIN, SABOTAGED, Case
from porter.verify.modes import CORE, TELLING, Mode, all_modes


class Tier(enum.StrEnum):
    """How much is run where no modes are named.

    `full` takes every mode and every call; `core` one mode for each way of splitting, on
    the calls without callbacks; `fast` one mode with one call and its sabotage, which is a
    check and no proof.
    """

    full = "full"
    core = "core"
    fast = "fast"


@dataclass(frozen=True)
class Selection:
    """What was asked for.

    Attributes:
        modes: the modes that were named, or None for those of the tier.
        tier: how much to run where `modes` is None.
        missing: leave out modes that are proven already.
    """

    modes: Sequence[Mode] | None = None
    tier: Tier = Tier.full
    missing: bool = False

    @property
    def is_proof(self) -> bool:
        """Whether what is found may be kept."""
        return self.modes is not None or self.tier is not Tier.fast

    @property
    def cases(self) -> tuple[Case, ...] | None:
        """The calls to compare; None for all that a pipeline can run."""
        if self.modes is not None or self.tier is Tier.full:
            return None
        return PLAIN if self.is_proof else (SABOTAGED,)

    def of_port(self, name: str, entry: Mapping[str, Any]) -> tuple[Mode, ...]:
        """The modes to verify of one port.

        Args:
            name: of the port.
            entry: of the lock.

        Raises:
            PorterError: the port lacks a mode that was named.
        """
        refused: Mapping[str, str] = entry.get("refused_modes", {})
        chosen = []
        for mode in self._candidates():
            lacking = [kind for kind in mode.kinds if kind in refused]
            if not lacking:
                chosen.append(mode)
            elif self.modes is not None:
                raise PorterError(
                    f"mode {mode.name}: {name} is ported without {lacking[0]}"
                    f" ({refused[lacking[0]]})",
                    expected="modes that the port has",
                )
        if self.missing:
            chosen = [mode for mode in chosen if not _is_proven(mode, entry)]
        return tuple(chosen if self.is_proof else chosen[:1])

    def _candidates(self) -> Sequence[Mode]:
        if self.modes is not None:
            return self.modes
        if self.tier is Tier.full:
            return all_modes()
        return CORE if self.is_proof else [m for m in TELLING if m.dp == 1]


def _is_proven(mode: Mode, entry: Mapping[str, Any]) -> bool:
    proofs = entry.get("proofs")
    if not proofs or proofs["key"] != proof_key(entry):
        return False
    return mode.name in proofs["modes"].get(mode.proof, {})
