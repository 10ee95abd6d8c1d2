"""Words of everything that porter prints: results to stdout, messages to stderr."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from porter.diff import Hunk, changed_lines, file_header, hunks
from porter.errors import InternalError, PorterError
from porter.names import output_path
from porter.port import Port

_STYLES = {"+": "green", "-": "red", "@": "cyan"}


class Report:
    """Prints for a reader, or one JSON object for a program.

    Args:
        as_json: whether stdout gets JSON.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self._out = Console(soft_wrap=True, highlight=False, markup=False)
        self._err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

    def error(self, error: PorterError) -> None:
        """One line on stderr."""
        self._err.print(Text(f"error: {error}"))

    def message(self, text: str) -> None:
        """A line on stderr that is no result."""
        self._err.print(Text(text))

    def line(self, text: str, style: str = "") -> None:
        """A line of the result."""
        self._out.print(Text(text, style=style))

    def json(self, data: Any) -> None:
        """The result as JSON."""
        print(json.dumps(data, indent=2, sort_keys=True))

    def port(self, port: Port, changed: Sequence[str]) -> None:
        """What a port consists of and how much of it is new."""
        self.line(port.name, "bold")
        for unit in port.classes:
            path = output_path(unit.kind, unit.upstream.module)
            state = "written" if path in changed else "unchanged"
            self.line(
                f"  {path}: {unit.name}, {changed_lines(unit)} lines changed, {state}"
            )
            rules = ", ".join(f"{r} ({n})" for r, n in unit.rewrite.counts.items())
            self.line(f"    {rules}")
        for mode, reason in sorted(port.classes[0].refused_modes.items()):
            self.line(f"  without {mode}: {reason}")

    def results(self, results: Mapping[str, Port | PorterError]) -> None:
        """A table of a run over many classes: one line each, then the counts."""
        width = max(map(len, results), default=0)
        counts: Counter[str] = Counter()
        for name, result in sorted(results.items()):
            counts[state(result)] += 1
            self.line(f"{name:<{width}}  {state(result):<14}  {_summary(result)}")
        found = [f"{count} {word}" for word, count in sorted(counts.items())]
        self.line(", ".join(found) or "no pipelines")

    def diff(self, port: Port, outputs: Mapping[str, str]) -> None:
        """The unified diff of every class against upstream."""
        for unit in port.classes:
            for text in file_header(unit):
                self.line(text, "bold")
            rendered = outputs[output_path(unit.kind, unit.upstream.module)]
            for hunk in hunks(unit, rendered):
                self._hunk(hunk)

    def _hunk(self, hunk: Hunk) -> None:
        self.line(hunk.title(), _STYLES["@"])
        for text in hunk.lines:
            self.line(text, _STYLES.get(text[:1], ""))


def state(result: Port | PorterError) -> str:
    """One word or two for what became of a class."""
    if isinstance(result, InternalError):
        return "internal error"
    return "refused" if isinstance(result, PorterError) else "ported"


def _summary(result: Port | PorterError) -> str:
    if isinstance(result, PorterError):
        return str(result)
    lines = ", ".join(f"{u.kind} {changed_lines(u)}" for u in result.classes)
    refused = sorted(result.classes[0].refused_modes.items())
    without = "".join(f"; without {mode} ({reason})" for mode, reason in refused)
    return f"lines changed: {lines}{without}"


def port_json(port: Port, changed: Sequence[str]) -> dict[str, Any]:
    """A port as JSON."""
    return {
        "status": "ported",
        "classes": [
            {
                "file": output_path(unit.kind, unit.upstream.module),
                "class": unit.name,
                "changed_lines": changed_lines(unit),
                "rules": dict(unit.rewrite.counts),
            }
            for unit in port.classes
        ],
        "written": sorted(set(changed) & port.paths()),
        "refused_modes": dict(port.classes[0].refused_modes),
    }


def diff_json(port: Port, outputs: Mapping[str, str]) -> list[dict[str, Any]]:
    """The hunks of a port as JSON."""
    return [
        {
            "file": output_path(unit.kind, unit.upstream.module),
            "class": unit.name,
            "hunks": [
                hunk.to_json()
                for hunk in hunks(
                    unit, outputs[output_path(unit.kind, unit.upstream.module)]
                )
            ],
        }
        for unit in port.classes
    ]
