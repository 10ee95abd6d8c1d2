"""What was measured of each layout, and the figures that follow from it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.layouts import OURS, STOCK, Layout
from benchmarks.processes import Outcome


@dataclass
class Row:
    """A layout of a model at a size.

    Attributes:
        step_ms: a step's milliseconds, one figure for each pair of timed calls.
        call_ms: milliseconds of whole calls by their number of steps.
        first_call_s: the first call, compilation and capture included.
        reshape_s: the first call of another size, less the second one.
        peak_gib: most memory allocated on any rank.
        difference: relative L2 to the latents of one GPU.
        rounding: relative L2 to those of one GPU in fp32.
        spread: relative L2 to the same engine on one GPU with the same kernels: what is due to
            several GPUs alone.
        notes: what the runtime has to say about captures.
        error: why there is no figure.
    """

    model: str
    size: int
    layout: Layout
    step_ms: list[float] = field(default_factory=list)
    call_ms: list[float] = field(default_factory=list)
    first_call_s: float | None = None
    reshape_s: float | None = None
    peak_gib: float | None = None
    difference: float | None = None
    rounding: float | None = None
    spread: float | None = None
    notes: list[str] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None

    @property
    def median_ms(self) -> float | None:
        """Median milliseconds of a step after the first ones of a call."""
        return statistics.median(self.step_ms) if self.step_ms else None

    @property
    def is_exact(self) -> bool:
        """False for PipeFusion, which uses keys of the step before by design."""
        return "pipefusion" not in self.layout.mode


def add_round(row: Row, outcome: Outcome, extra_steps: int, steps: int) -> None:
    """Take over one process's measurement.

    Args:
        extra_steps: steps that a long call has more than a short one.
        steps: of a long call.
    """
    assert outcome.result is not None
    result = outcome.result
    row.error = None
    for short, long in zip(
        result["short_calls_s"], result["long_calls_s"], strict=True
    ):
        row.step_ms.append((long - short) / extra_steps * 1e3)
        row.call_ms.append(long / steps * 1e3)
    row.first_call_s = result["first_call_s"]
    if result.get("other_size_s"):
        first, second = result["other_size_s"]
        row.reshape_s = first - second
    row.peak_gib = result["peak_bytes"] / 2**30
    row.notes = list(result.get("not_captured", []))
    row.notes += [f"heads travel {way}" for way in result.get("heads_travel", [])]
    row.notes += [f"attention {kernel}" for kernel in result.get("attention", [])]
    row.details.append({**result, "process_s": outcome.seconds})


def add_error(row: Row, error: str) -> None:
    """A round without figures; those of earlier rounds stay."""
    row.error = error


def is_fine(row: Row, gate: float, rows: Iterable[Row] = ()) -> bool:
    """The layout ran, and agrees with one GPU where it must.

    Where rounding alone moves stock diffusers further than the gate, a row agrees that is no
    further from fp32 than stock diffusers is, eager or compiled.

    Args:
        row: of ours.
        gate: relative L2 to one GPU that exact modes may have.
        rows: of the same run, for what stock diffusers differs from fp32.
    """
    if row.error is not None or row.difference is None:
        return False
    if not row.is_exact or row.difference <= gate:
        return True
    own = [
        stock.rounding
        for stock in rows
        if stock.layout.engine == STOCK
        and not stock.layout.is_of_rounding
        and stock.rounding is not None
        and (stock.model, stock.size) == (row.model, row.size)
    ]
    furthest = max(own, default=0.0)
    return row.rounding is not None and furthest > gate and row.rounding <= furthest


def best_single(rows: Iterable[Row], *, compiled: bool | None = None) -> float | None:
    """The best of stock diffusers on one GPU, eager or compiled unless one is named."""
    return _best(
        r
        for r in rows
        if r.layout.engine == STOCK
        and not r.layout.is_of_rounding
        and (compiled is None or r.layout.compiled == compiled)
    )


def is_slower(row: Row, rows: Iterable[Row], tolerance: float = 1.02) -> bool:
    """Slower than one GPU: than the best of diffusers where several GPUs are used, than
    diffusers with the same kernels where one is."""
    compiled = None if row.layout.num_ranks > 1 else row.layout.compiled
    single = best_single(rows, compiled=compiled)
    return (
        single is not None
        and not row.layout.is_of_rounding
        and row.median_ms is not None
        and row.median_ms > tolerance * single
    )


def best_peer(
    rows: Iterable[Row], *, compiled: bool | None = None, like: Row | None = None
) -> float | None:
    """The best layout of several GPUs that is not ours.

    Args:
        rows: of one model and size.
        compiled: with or without compiled blocks, None for either.
        like: a row with as many GPUs and the same access between them, None for any.
    """
    return _best(
        r
        for r in rows
        if r.layout.engine not in (OURS, STOCK)
        and (compiled is None or r.layout.compiled == compiled)
        and (
            like is None
            or (r.layout.num_ranks, r.layout.environment)
            == (like.layout.num_ranks, like.layout.environment)
        )
    )


def _best(rows: Iterable[Row]) -> float | None:
    found = [row.median_ms for row in rows if row.median_ms is not None]
    return min(found) if found else None
