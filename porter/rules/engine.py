"""Runs rules on the original tree and applies all their edits in one pass."""

from __future__ import annotations

import io
import textwrap
import tokenize
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import libcst as cst

from porter.errors import RuleError
from porter.parsed import ParsedModule, walk
from porter.rules.base import Edit, Import, Rule
from porter.rules.format import INDENT, UPSTREAM_LINE_LENGTH, format_statements


@dataclass(frozen=True)
class Rewrite:
    """The result of all rules on one module.

    Attributes:
        module: the original.
        edits: every edit, in the order of the text.
        counts: rule id to number of matches; rules without a match are left out.
        imports: (module, name) pairs that the emitted text needs, sorted.
    """

    module: ParsedModule
    edits: tuple[Edit, ...]
    counts: dict[str, int]
    imports: tuple[Import, ...]

    def original(self, node: cst.CSTNode) -> str:
        """Upstream's lines of a class or function, decorators included."""
        start, end = excerpt(self.module, node)
        return self.module.text[start:end] + "\n"

    def text(self, node: cst.CSTNode) -> str:
        """The same lines after all edits."""
        start, end = excerpt(self.module, node)
        inside = [
            edit for edit in self.edits if start <= edit.start and edit.end <= end
        ]
        return _apply(self.module, inside, start, end) + "\n"


def excerpt(module: ParsedModule, node: cst.CSTNode) -> tuple[int, int]:
    """Offsets of the whole lines of a class or function, its decorators included."""
    first = node
    if isinstance(node, cst.FunctionDef | cst.ClassDef) and node.decorators:
        first = node.decorators[0]
    start = module.line_start(module.line(first))
    return start, module.line_end(module.last_line(node))


def apply_rules(
    module: ParsedModule,
    rules: Iterable[Rule[Any]],
    facts: Any,
    *,
    subject: str,
    within: Sequence[cst.CSTNode],
) -> Rewrite:
    """Computes every rule's edits and checks them against each other.

    Args:
        module: the original.
        rules: in the manual's order, which is also the order of insertions that meet.
        facts: handed to every rule.
        subject: what is ported, for messages (a class name).
        within: the classes or functions that end up in the generated file.

    Raises:
        RuleError: another number of matches than the rule expects, an edit outside
            `within`, or two edits that overlap.
    """
    edits: list[Edit] = []
    counts: dict[str, int] = {}
    imports: set[Import] = set()
    for rule in rules:
        found = list(rule.edits(module, facts))
        count = len({edit.at for edit in found})
        _check_count(module, rule, facts, subject, found, count)
        if found:
            counts[rule.id] = count
            imports.update(rule.imports)
        edits.extend(found)
    spans = [excerpt(module, node) for node in within]
    for edit in edits:
        if not any(start <= edit.start and edit.end <= end for start, end in spans):
            raise RuleError(
                f"{edit.rule}: an edit outside the rewritten methods of {subject}",
                where=f"{module.file}:{edit.at}",
            )
    ordered = sorted(_by_statement(module, edits, within), key=_order)
    _check_overlap(module, ordered)
    rewrite = Rewrite(module, tuple(ordered), counts, tuple(sorted(imports)))
    for node in within:
        _check_comments(rewrite, node, subject)
    return rewrite


def _check_comments(rewrite: Rewrite, node: cst.CSTNode, subject: str) -> None:
    lost = _comments(rewrite.original(node)) - _comments(rewrite.text(node))
    if lost:
        raise RuleError(
            f"a comment of {subject} that an edit drops: {next(iter(lost))!r}",
            expected="every comment of the original in the port",
            where=rewrite.module.where(node),
        )


def _comments(text: str) -> Counter[str]:
    tokens = tokenize.generate_tokens(io.StringIO(textwrap.dedent(text)).readline)
    return Counter(t.string for t in tokens if t.type == tokenize.COMMENT)


def _check_count(
    module: ParsedModule,
    rule: Rule[Any],
    facts: Any,
    subject: str,
    found: Sequence[Edit],
    count: int,
) -> None:
    fewest, most = rule.expected(module, facts)
    if fewest <= count <= most:
        return
    line = found[most].at if count > most else 1
    wanted = str(fewest) if fewest == most else f"{fewest} to {most}"
    raise RuleError(
        f"{rule.id}: {subject}: {count} matches",
        expected=f"{wanted} ({rule.summary})",
        todo=f"port it by hand or extend rule {rule.id}",
        where=f"{module.file}:{line}",
    )


def _order(edit: Edit) -> tuple[int, int, int]:
    # A nest opens before whatever starts at the same place and does not stand outside it.
    return edit.start, 0 if edit.outside else 1 if edit.nest else 2, edit.end


def _check_overlap(module: ParsedModule, ordered: Sequence[Edit]) -> None:
    last: Edit | None = None
    nests: list[Edit] = []
    for edit in ordered:
        while nests and nests[-1].end < edit.start + edit.outside:
            nests.pop()
        clash = last if last is not None and edit.start < last.end else None
        if nests and edit.end > nests[-1].end:
            clash = nests[-1]
        if clash is not None and not (edit.nest and clash is last):
            raise RuleError(
                f"edits of {clash.rule} and {edit.rule} that overlap",
                expected="edits of separate statements",
                where=f"{module.file}:{edit.at}",
            )
        if edit.nest:
            nests.append(edit)
        else:
            last = edit


def _by_statement(
    module: ParsedModule, edits: Sequence[Edit], within: Sequence[cst.CSTNode]
) -> list[Edit]:
    """Joins edits inside one simple statement into one edit of that statement.

    The statement is the unit that is formatted, and only where a line becomes too long.
    """
    statements = [
        node
        for root in within
        for node in walk(root)
        if isinstance(node, cst.SimpleStatementLine)
    ]
    whole: list[Edit] = []
    inside: dict[cst.SimpleStatementLine, list[Edit]] = {}
    spans = [(module.span(node), node) for node in statements]
    for edit in edits:
        home = next(
            (
                node
                for (start, end), node in spans
                if start <= edit.start < end
                and edit.end <= end
                and not edit.nest
                and not (edit.start == start and edit.end == end)
            ),
            None,
        )
        if home is None:
            whole.append(edit)
        else:
            inside.setdefault(home, []).append(edit)
    for statement, parts in inside.items():
        whole.append(_joined(module, statement, sorted(parts, key=_order)))
    return whole


def _joined(
    module: ParsedModule, statement: cst.SimpleStatementLine, parts: Sequence[Edit]
) -> Edit:
    _check_overlap(module, parts)
    indentation = module.indentation(statement)
    start, _ = module.span(statement)
    end = module.line_end(module.last_line(statement))
    text = indentation + _apply(module, parts, start, end)
    if any(len(line) > UPSTREAM_LINE_LENGTH for line in text.splitlines()):
        text = format_statements(textwrap.dedent(text), indentation)
    rules = sorted({part.rule for part in parts})
    manuals = sorted({part.manual for part in parts})
    return replace(
        parts[0],
        start=start,
        end=end,
        text=text.lstrip(),
        rule=", ".join(rules),
        manual=", ".join(manuals),
    )


def _apply(module: ParsedModule, edits: Sequence[Edit], start: int, end: int) -> str:
    """The text of start..end after edits that are sorted and do not overlap."""
    out: list[str] = []
    place = start
    nests: list[Edit] = []

    def copy_to(stop: int) -> None:
        nonlocal place
        out.append(_indented(module, place, stop, len(nests)))
        place = stop

    def close(before: int) -> None:
        while nests and nests[-1].end < before:
            copy_to(nests[-1].end)
            footer = nests.pop().footer
            out.append(_deepened(footer, len(nests)))

    for edit in edits:
        close(edit.start + 1 if edit.outside else edit.start)
        copy_to(edit.start)
        if edit.nest:
            out.append(_deepened(edit.text, len(nests), first=True))
            nests.append(edit)
        else:
            at_line_start = edit.start == 0 or module.text[edit.start - 1] == "\n"
            out.append(_deepened(edit.text, len(nests), first=at_line_start))
            place = edit.end
    close(end + 1)
    copy_to(end)
    return "".join(out)


def _indented(module: ParsedModule, start: int, stop: int, depth: int) -> str:
    """Original text, moved to the right where its lines begin."""
    text = module.text[start:stop]
    if not depth or not text:
        return text
    line = module.text.count("\n", 0, start) + 1
    at_start = start == module.line_start(line)
    out: list[str] = []
    for number, piece in enumerate(text.splitlines(keepends=True)):
        begins = number > 0 or at_start
        # A last piece of blanks alone is the indentation of an edit that follows.
        filled = piece.strip() or not piece.endswith("\n")
        free = begins and filled and line + number not in module.string_lines
        out.append(INDENT * depth + piece if free else piece)
    return "".join(out)


def _deepened(text: str, depth: int, *, first: bool = False) -> str:
    """Emitted text, moved to the right: every line, the first only on demand."""
    if not depth:
        return text
    out: list[str] = []
    for number, piece in enumerate(text.splitlines(keepends=True)):
        moved = (number > 0 or first) and piece.strip()
        out.append(INDENT * depth + piece if moved else piece)
    return "".join(out)
