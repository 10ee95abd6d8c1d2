"""How a rewritten method differs from upstream's, each hunk with its rules."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from porter.names import output_path
from porter.render import Rewritten

_CONTEXT = 3


@dataclass(frozen=True)
class Hunk:
    """A run of changes.

    Attributes:
        header: `@@ -line,count +line,count @@`; the first pair counts lines of upstream's
            file, the second lines of the generated file.
        rules: ids of the rules that changed these lines.
        manual: the sections of the manual that the rules carry out.
        lines: the lines, each behind ' ', '-' or '+'.
    """

    header: str
    rules: tuple[str, ...]
    manual: tuple[str, ...]
    lines: tuple[str, ...]

    def title(self) -> str:
        """The header with rules and sections."""
        return (
            f"{self.header} {', '.join(self.rules)} [manual {', '.join(self.manual)}]"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def hunks(unit: Rewritten, rendered: str) -> list[Hunk]:
    """The hunks of one class; `rendered` is the generated file that holds it."""
    old, new = unit.original.splitlines(), unit.text.splitlines()
    start = unit.method_start
    new_start = rendered[: rendered.index(unit.text.rstrip("\n"))].count("\n") + 1
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    found = []
    for group in matcher.get_grouped_opcodes(_CONTEXT):
        first, last = group[0], group[-1]
        from_line, to_line = start + first[1], new_start + first[3]
        changed = [
            (start + op[1], start + max(op[2], op[1] + 1))
            for op in group
            if op[0] != "equal"
        ]
        rules, manual = _tags(unit, changed)
        found.append(
            Hunk(
                f"@@ -{from_line},{last[2] - first[1]}"
                f" +{to_line},{last[4] - first[3]} @@",
                rules,
                manual,
                tuple(_lines(group, old, new)),
            )
        )
    return found


def changed_lines(unit: Rewritten) -> int:
    """Lines added and removed, not counting those that only moved to the right."""
    old = [line.strip() for line in unit.original.splitlines() if line.strip()]
    new = [line.strip() for line in unit.text.splitlines() if line.strip()]
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    return sum(
        (i2 - i1) + (j2 - j1)
        for tag, i1, i2, j1, j2 in matcher.get_opcodes()
        if tag != "equal"
    )


def file_header(unit: Rewritten) -> tuple[str, str]:
    """The two lines above the hunks of a class."""
    path = output_path(unit.kind, unit.upstream.module)
    return (
        f"--- {unit.upstream.module.file} ({unit.upstream.class_name})",
        f"+++ generated/{path} ({unit.name})",
    )


def _lines(group: list[Any], old: list[str], new: list[str]) -> Iterator[str]:
    for tag, i1, i2, j1, j2 in group:
        if tag == "equal":
            yield from (f" {line}" for line in old[i1:i2])
            continue
        yield from (f"-{line}" for line in old[i1:i2])
        yield from (f"+{line}" for line in new[j1:j2])


def _tags(
    unit: Rewritten, changed: list[tuple[int, int]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Rules and sections of the edits that touch ranges of upstream lines."""
    module = unit.rewrite.module
    places = [
        (
            module.text.count("\n", 0, edit.start) + 1,
            module.text.count("\n", 0, edit.end) + 1,
            edit,
        )
        for edit in unit.rewrite.edits
    ]
    rules: dict[str, None] = {}
    manual: dict[str, None] = {}
    for start, stop in changed:
        away = [max(first - stop, start - last, 0) for first, last, _ in places]
        # A diff may slide an insertion over equal lines: the nearest edit made it.
        for distance, (_, _, edit) in zip(away, places, strict=True):
            if distance <= max(1, min(away)):
                rules.update(dict.fromkeys(edit.rule.split(", ")))
                manual.update(dict.fromkeys(edit.manual.split(", ")))
    return tuple(rules), tuple(manual)
