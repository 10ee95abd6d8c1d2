"""Tables and the plot of a run."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.layouts import OURS
from benchmarks.results import Row, best_peer, best_single, is_slower

_HEADER = (
    "| layout | ms a step | of one GPU | of the best peer | whole call, ms a step "
    "| first call, s | another size, s | peak GiB | difference | to own one | to fp32 |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def line(row: Row) -> str:
    """One row for the terminal."""
    where = f"{row.model} {row.size} {row.layout.name}"
    if row.median_ms is None:
        return f"{where}: {row.error}"
    difference = "-" if row.difference is None else f"{row.difference:.1e}"
    notes = f" ({'; '.join(row.notes)})" if row.notes else ""
    return f"{where}: {row.median_ms:.1f} ms a step, difference {difference}{notes}"


def markdown(rows: list[Row], about: Mapping[str, str]) -> str:
    """All tables, one for each model and size."""
    parts = [
        "# Benchmark",
        ", ".join(
            f"{name} {value}" for name, value in about.items() if name != "command"
        ),
        f"`{about['command']}`" if "command" in about else "",
        "Milliseconds a step: median of the differences between long and short calls. "
        "`of one GPU`: best stock diffusers on one GPU (eager or compiled) over this row. "
        "`of the best peer`: other engines on as many GPUs. `another size`: what the first call of "
        "another shape takes longer. "
        "`difference`: relative L2 of the final latents to stock diffusers on one GPU, compiled "
        "rows to compiled. `to own one`: to the same engine on one GPU, with the same kernels. "
        "`to fp32`: to the same weights and noise in fp32.",
    ]
    for model, size in dict.fromkeys((row.model, row.size) for row in rows):
        own = [row for row in rows if (row.model, row.size) == (model, size)]
        parts += [f"## {model}, {size} px", table(own)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(rows: list[Row]) -> str:
    """The table of one model at one size; rows slower than one GPU say so."""
    single = best_single(rows)
    lines = [_HEADER]
    for row in rows:
        if row.median_ms is None:
            lines.append(
                f"| {row.layout.name} | {row.error or 'not run'} | | | | | | | | | |"
            )
            continue
        call = sorted(row.call_ms)[len(row.call_ms) // 2]
        cells = [
            row.layout.name
            + (" **(slower than one GPU)**" if is_slower(row, rows) else ""),
            f"{row.median_ms:.1f}",
            _ratio(single, row.median_ms),
            _ratio(_peer_of(row, rows), row.median_ms),
            f"{call:.1f}",
            "" if row.first_call_s is None else f"{row.first_call_s:.1f}",
            "" if row.reshape_s is None else f"{row.reshape_s:.1f}",
            f"{row.peak_gib:.1f}" if row.peak_gib else "",
            *(
                "" if figure is None else f"{figure:.1e}"
                for figure in (row.difference, row.spread, row.rounding)
            ),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    without = _without_compiling(rows)
    lines += [f"\n{without}"] if without else []
    notes = dict.fromkeys(
        f"{row.layout.name}: {note}" for row in rows for note in row.notes
    )
    return "\n".join([*lines, *(f"\n{note}" for note in notes)])


def _without_compiling(rows: list[Row]) -> str:
    """Our best row that is not compiled, and how it stands to the best such peer."""
    ours = [
        row
        for row in rows
        if row.layout.engine == OURS
        and row.layout.num_ranks > 1
        and not row.layout.compiled
        and row.median_ms is not None
    ]
    best = min(ours, key=lambda row: row.median_ms or 0, default=None)
    peer = None if best is None else best_peer(rows, compiled=False, like=best)
    if best is None or best.median_ms is None or peer is None:
        return ""
    return (
        f"Without compiling: {best.layout.name} is {_ratio(peer, best.median_ms)} of the best "
        f"peer, {peer:.1f} ms."
    )


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(rows: Iterable[Row], path: Path) -> None:
    """Bars of the milliseconds a step, ours in a colour of their own; needs `can_plot`.

    Rows that are there for their result alone are left out.
    """
    measured = [
        row
        for row in rows
        if row.median_ms is not None and not row.layout.is_of_rounding
    ]
    if not measured:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    keys = list(dict.fromkeys((row.model, row.size) for row in measured))
    figure, axes = pyplot.subplots(
        1, len(keys), figsize=(6 * len(keys), 6), squeeze=False
    )
    for axis, key in zip(axes[0], keys, strict=True):
        own = [row for row in measured if (row.model, row.size) == key][::-1]
        axis.barh(
            [r.layout.name for r in own],
            [r.median_ms or 0 for r in own],
            color=["C0" if r.layout.engine == OURS else "C7" for r in own],
        )
        axis.set_title(f"{key[0]}, {key[1]} px: ms a step")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _peer_of(row: Row, rows: list[Row]) -> float | None:
    """The best peer on as many GPUs; a row of one GPU has that of the fewest."""
    if row.layout.num_ranks > 1:
        return best_peer(rows, like=row)
    peers = [r for r in rows if r.layout.num_ranks > 1 and not r.layout.environment]
    fewest = min(peers, key=lambda r: r.layout.num_ranks, default=None)
    return None if fewest is None else best_peer(rows, like=fewest)


def _ratio(reference: float | None, value: float) -> str:
    return "" if reference is None else f"{reference / value:.2f}x"
