"""What verification found: measurements, verdicts, the table and the JSON of both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from porter.verify.gate import gate, passes, sabotage_shows
from porter.verify.modes import Mode


@dataclass(frozen=True)
class Measurement:
    """One call in one mode.

    Attributes:
        case: name of the case.
        error: relative L2 distance to the reference.
        floor: the reference's own rounding.
        callback_ok: whether every rank called the callback at the steps that stock did.
    """

    case: str
    error: float
    floor: float
    callback_ok: bool = True

    @property
    def gate(self) -> float:
        """The largest error that passes."""
        return gate(self.floor)

    @property
    def passes(self) -> bool:
        """True for an error within the gate, and callbacks as in stock."""
        return self.callback_ok and passes(self.error, self.floor)


@dataclass(frozen=True)
class Sabotage:
    """One injected fault in one mode.

    Attributes:
        fault: its name.
        error: relative L2 distance to the reference; NaN where the ranks stopped.
        floor: the reference's own rounding.
        note: why there is no error, or that the fault was never met.
    """

    fault: str
    error: float
    floor: float
    note: str = ""

    @property
    def shows(self) -> bool:
        """True when the gate cannot have missed it."""
        return not self.note and sabotage_shows(self.error, self.floor)


@dataclass(frozen=True)
class ModeVerdict:
    """All that was measured in one mode.

    Attributes:
        mode: the layout.
        reference: `stock` or `oracle`.
        measurements: by case.
        sabotages: by fault.
        failure: what stopped the ranks, or None.
    """

    mode: Mode
    reference: str
    measurements: tuple[Measurement, ...] = ()
    sabotages: tuple[Sabotage, ...] = ()
    failure: str | None = None

    @property
    def worst(self) -> Measurement | None:
        """The measurement that is nearest to its gate or furthest beyond it."""
        if not self.measurements:
            return None
        return max(self.measurements, key=lambda m: (not m.passes, m.error / m.gate))

    @property
    def weakest(self) -> Sabotage | None:
        """The sabotage that shows least."""
        if not self.sabotages:
            return None
        return min(
            self.sabotages,
            key=lambda s: (s.shows, -math.inf if math.isnan(s.error) else s.error),
        )

    @property
    def status(self) -> str:
        """`proven`, `failed` (an error beyond its gate), `stopped` (a rank raised), or
        `unproven` (a sabotage was not caught)."""
        if self.failure is not None or not self.measurements:
            return "stopped"
        if not all(m.passes for m in self.measurements):
            return "failed"
        shown = bool(self.sabotages) and all(s.shows for s in self.sabotages)
        return "proven" if shown else "unproven"

    @property
    def explanation(self) -> str:
        """Why the mode is not proven; empty when it is."""
        worst, weakest = self.worst, self.weakest
        if self.status == "stopped":
            return self.failure or "no case of this pipeline suits the mode"
        if self.status == "failed" and worst is not None:
            if not worst.callback_ok:
                return f"{worst.case}: callbacks differ from stock's"
            return f"{worst.case}: error {worst.error:.1e} > gate {worst.gate:.1e}"
        if self.status == "unproven" and weakest is not None:
            return f"sabotage {weakest.fault} not caught: " + (
                weakest.note or f"error {weakest.error:.1e}"
            )
        return "" if self.status == "proven" else "no sabotage was run"

    def to_json(self) -> dict[str, Any]:
        """All numbers, for programs."""
        return {
            "mode": self.mode.name,
            "ranks": self.mode.world_size,
            "status": self.status,
            "reference": self.reference,
            "explanation": self.explanation,
            "cases": [
                {
                    "case": m.case,
                    "error": _number(m.error),
                    "floor": m.floor,
                    "gate": m.gate,
                    "passes": m.passes,
                }
                for m in self.measurements
            ],
            "sabotages": [
                {
                    "fault": s.fault,
                    "error": _number(s.error),
                    "shows": s.shows,
                    "note": s.note,
                }
                for s in self.sabotages
            ],
        }


@dataclass(frozen=True)
class Verification:
    """The verdicts on one pipeline.

    Attributes:
        pipeline: class name.
        verdicts: one a mode, in the order of the modes.
        rejected: cases that prove nothing on this model, with the reason.
        seconds: wall time.
    """

    pipeline: str
    verdicts: tuple[ModeVerdict, ...]
    rejected: Mapping[str, str]
    seconds: float

    @property
    def exit_code(self) -> int:
        """0 when every mode is proven, else 1."""
        proven = bool(self.verdicts) and all(
            v.status == "proven" for v in self.verdicts
        )
        return 0 if proven else 1

    @property
    def proven(self) -> tuple[ModeVerdict, ...]:
        """The verdicts of the proven modes."""
        return tuple(v for v in self.verdicts if v.status == "proven")

    def to_json(self) -> dict[str, Any]:
        """All numbers, for programs."""
        return {
            "pipeline": self.pipeline,
            "exit_code": self.exit_code,
            "seconds": round(self.seconds, 1),
            "rejected_cases": dict(self.rejected),
            "modes": [verdict.to_json() for verdict in self.verdicts],
        }

    def table(self) -> str:
        """The verdicts as lines of aligned columns, then what is not proven and why."""
        header = ("mode", "ranks", "cases", "error", "floor", "gate", "sabotage")
        rows: list[tuple[str, ...]] = [(*header, "against", "verdict")]
        rows += [_row(verdict) for verdict in self.verdicts]
        lines = _aligned(rows)
        for case, reason in self.rejected.items():
            lines.append(f"case {case} left out: {reason}")
        for verdict in self.verdicts:
            if verdict.explanation:
                lines.append(f"{verdict.mode.name}: {verdict.explanation}")
        lines.append(
            f"{self.pipeline}: {len(self.proven)} of {len(self.verdicts)} modes proven"
            f" in {self.seconds:.0f} s"
        )
        return "\n".join(lines)


def _row(verdict: ModeVerdict) -> tuple[str, ...]:
    worst, weakest = verdict.worst, verdict.weakest
    numbers: tuple[str, ...] = ("-", "-", "-")
    if worst is not None:
        numbers = tuple(f"{n:.1e}" for n in (worst.error, worst.floor, worst.gate))
    return (
        verdict.mode.name,
        str(verdict.mode.world_size),
        str(len(verdict.measurements)),
        *numbers,
        "-" if weakest is None else f"{weakest.error:.1e} {weakest.fault}",
        verdict.reference,
        verdict.status,
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def _number(value: float) -> float | str:
    """JSON knows no NaN and no infinity."""
    return value if math.isfinite(value) else str(value)
