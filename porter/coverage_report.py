"""A survey as text for a terminal, as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from porter.coverage import MODES, REFUSED, STATES, Coverage, Row

_MARKS = dict(zip(STATES, ("yes", "-", "no"), strict=True))


def json_text(coverage: Coverage) -> str:
    """JSON with sorted keys; equal surveys have equal texts."""
    data: dict[str, Any] = {
        "diffusers": coverage.library,
        "task": coverage.task,
        "pipelines": {
            row.name: {
                "task": row.task,
                "ported": row.is_ported,
                "modes": {
                    mode: {"state": cell.state, "reason": cell.reason}
                    for mode, cell in row.cells.items()
                },
            }
            for row in coverage.rows
        },
        "counts": coverage.counts(),
        "rules": coverage.rules,
        "changed_lines": coverage.changed_lines,
        "median_changed_lines": coverage.medians(),
    }
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def plain_text(coverage: Coverage) -> str:
    """A table of marks, the reasons below it, and the counts."""
    width = max((len(row.name) for row in coverage.rows), default=0)
    columns = [(mode, max(len(mode), 3)) for mode in MODES]
    heads = "  ".join(f"{mode:<{size}}" for mode, size in columns)
    lines = [f"{'':<{width}}  {heads}".rstrip()]
    for row in coverage.rows:
        marks = "  ".join(
            f"{_MARKS[row.cells[mode].state]:<{size}}" for mode, size in columns
        )
        lines.append(f"{row.name:<{width}}  {marks}".rstrip())
        lines += [f"  without {modes}: {why}" for modes, why in _refusals(row)]
    lines += ["", f"{', '.join(f'{_MARKS[s]} = {s}' for s in STATES)}", ""]
    lines += [
        f"{mode}: {', '.join(f'{number} {s}' for s, number in counts.items())}"
        for mode, counts in coverage.counts().items()
    ]
    return "\n".join([*lines, "", *_rules(coverage), *_medians(coverage)])


def markdown_text(coverage: Coverage) -> str:
    """The same as Markdown tables."""
    total = len(coverage.rows)
    ported = sum(row.is_ported for row in coverage.rows)
    scope = f" for {coverage.task}" if coverage.task else ""
    lines = [
        "# Coverage",
        "",
        f"{total} pipelines{scope} in diffusers {coverage.library}, {ported} ported."
        " Made by `porter coverage --markdown`.",
        "",
        _table_row("mode", *STATES),
        _table_row(*["---"] * (1 + len(STATES))),
    ]
    for mode, counts in coverage.counts().items():
        lines.append(_table_row(mode, *map(str, counts.values())))
    legend = ", ".join(f"{_MARKS[state]}: {state}" for state in STATES)
    lines += ["", f"{legend}.", "", _table_row("pipeline", *MODES)]
    lines.append(_table_row(*["---"] * (1 + len(MODES))))
    for row in coverage.rows:
        marks = [_MARKS[cell.state] for cell in row.cells.values()]
        lines.append(_table_row(row.name, *marks))
    lines += ["", "## Refused", ""]
    lines += [
        f"- {row.name}, {modes}: {why}"
        for row in coverage.rows
        for modes, why in _refusals(row)
    ]
    lines += ["", "## Rules", "", "How many classes each rule changes.", ""]
    lines += [f"- {line}" for line in _rules(coverage)]
    lines += ["", "## Size", ""]
    lines += [f"- {line}" for line in _medians(coverage)]
    return "\n".join(lines) + "\n"


def _refusals(row: Row) -> Iterator[tuple[str, str]]:
    """The modes that one reason prevents, and the reason."""
    reasons: dict[str, list[str]] = {}
    for mode, cell in row.cells.items():
        if cell.state == REFUSED:
            reasons.setdefault(cell.reason, []).append(mode)
    for reason, modes in reasons.items():
        yield "all" if len(modes) == len(MODES) else ", ".join(modes), reason


def _rules(coverage: Coverage) -> Iterator[str]:
    for kind, rules in coverage.rules.items():
        for rule, users in rules.items():
            only = ""
            if len(users) == 1:
                only = f" ({users[0]}: {coverage.reasons[rule] or 'no reason given'})"
            yield f"{kind} {rule}: {len(users)}{only}"


def _medians(coverage: Coverage) -> Iterator[str]:
    for kind, median in coverage.medians().items():
        yield f"median of changed lines a {kind} class: {median:g}"


def _table_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
