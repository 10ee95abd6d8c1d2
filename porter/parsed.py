"""One upstream file, parsed once: tree, positions, parents and the exact text.

All offsets are in characters of `text`; all lines count from 1.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from typing import Any, TypeVar, cast

import libcst as cst
from libcst.metadata import (
    CodeRange,
    MetadataWrapper,
    PositionProvider,
)

from porter.errors import PorterError

Node = TypeVar("Node", bound=cst.CSTNode)
Statement = cst.SimpleStatementLine | cst.BaseCompoundStatement


class _Positions(PositionProvider):
    """`MetadataWrapper.resolve` goes through the tree once more, for visitors it has not."""

    def of(self, wrapper: MetadataWrapper) -> Mapping[cst.CSTNode, CodeRange]:
        """Where each node stands."""
        return cast("Mapping[cst.CSTNode, CodeRange]", self._gen(wrapper))


class ParsedModule:
    """The tree of one source file together with its text.

    Args:
        name: dotted module name, as `import` would write it.
        file: path relative to the parent of the top-level package, for messages.
        text: the source.
        only: parse of the top-level definitions just this class: a long file with one
            class of interest is parsed 20 times faster.

    Raises:
        PorterError: the text is not valid Python.
    """

    def __init__(
        self, name: str, file: str, text: str, *, only: str | None = None
    ) -> None:
        self.name = name
        self.file = file
        self.text = text
        self._only = only
        # Here, so that a syntax error shows at once.
        _ = self._wrapper

    def __getstate__(self) -> dict[str, Any]:
        """The text alone travels between processes: its tree is made again on demand."""
        return {key: self.__dict__[key] for key in ("name", "file", "text", "_only")}

    @cached_property
    def _wrapper(self) -> MetadataWrapper:
        text = self.text if self._only is None else _blanked(self.text, self._only)
        try:
            tree = cst.parse_module(text)
        except cst.ParserSyntaxError as error:
            raise PorterError(
                f"a syntax error ({error.message})",
                expected="Python source",
                where=f"{self.file}:{error.raw_line}",
            ) from error
        # The parser makes every node once, so the wrapper needs no copy of the tree.
        return MetadataWrapper(tree, unsafe_skip_copy=True)

    @cached_property
    def tree(self) -> cst.Module:
        """The whole file."""
        return self._wrapper.module

    @cached_property
    def _ranges(self) -> Mapping[cst.CSTNode, CodeRange]:
        return _Positions().of(self._wrapper)

    @cached_property
    def _parents(self) -> Mapping[cst.CSTNode, cst.CSTNode]:
        return {child: node for node in walk(self.tree) for child in children_of(node)}

    @cached_property
    def _line_starts(self) -> list[int]:
        starts = [0]
        for line in self.text.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        return starts

    @cached_property
    def string_lines(self) -> frozenset[int]:
        """Lines that begin inside a string: they must not be indented."""
        inside: set[int] = set()
        for node in walk(self.tree):
            if isinstance(node, cst.SimpleString | cst.FormattedString):
                place = self._ranges[node]
                inside.update(range(place.start.line + 1, place.end.line + 1))
        return frozenset(inside)

    def line(self, node: cst.CSTNode) -> int:
        """First line of a node, without the comments above it."""
        return self._ranges[node].start.line

    def last_line(self, node: cst.CSTNode) -> int:
        """Last line that holds text of a node."""
        end = self._ranges[node].end
        return end.line - 1 if end.column == 0 else end.line

    def line_start(self, line: int) -> int:
        """Offset of the first character of a line."""
        return self._line_starts[line - 1]

    def line_end(self, line: int) -> int:
        """Offset just behind the last character of a line, before its newline."""
        end = self._line_starts[line] if line < len(self._line_starts) else -1
        text = self.text[self._line_starts[line - 1] : end if end >= 0 else None]
        return self._line_starts[line - 1] + len(text.rstrip("\r\n"))

    def span(self, node: cst.CSTNode) -> tuple[int, int]:
        """Offsets (start, end) of a node, without the comments above it."""
        place = self._ranges[node]
        return (
            self._line_starts[place.start.line - 1] + place.start.column,
            self._line_starts[place.end.line - 1] + place.end.column,
        )

    def source(self, node: cst.CSTNode) -> str:
        """The text of a node, byte for byte."""
        start, end = self.span(node)
        return self.text[start:end]

    def where(self, node: cst.CSTNode) -> str:
        """`file:line` of a node, for messages."""
        return f"{self.file}:{self.line(node)}"

    def first_line(self, statement: cst.CSTNode) -> int:
        """Line of the topmost comment that stands directly above a statement."""
        line = self.line(statement)
        while line > 1 and self._text_of_line(line - 1).lstrip().startswith("#"):
            line -= 1
        return line

    def indentation(self, statement: cst.CSTNode) -> str:
        """Blanks before a statement.

        Raises:
            PorterError: the statement shares its line with another one.
        """
        start = self.span(statement)[0]
        lead = self.text[self.line_start(self.line(statement)) : start]
        if lead.strip():
            raise PorterError(
                "a statement behind another one on the same line",
                expected="one statement a line",
                where=self.where(statement),
            )
        return lead

    def _text_of_line(self, line: int) -> str:
        return self.text[self.line_start(line) : self.line_end(line)]

    def parent(self, node: cst.CSTNode) -> cst.CSTNode | None:
        """The node that holds `node`; None for the module."""
        return self._parents.get(node)

    def ancestors(self, node: cst.CSTNode) -> Iterator[cst.CSTNode]:
        """The nodes that hold `node`, innermost first."""
        above = self._parents.get(node)
        while above is not None:
            yield above
            above = self._parents.get(above)

    def statement(self, node: cst.CSTNode) -> Statement:
        """The innermost whole statement that holds `node` (or is it)."""
        for above in (node, *self.ancestors(node)):
            if isinstance(above, cst.SimpleStatementLine | cst.BaseCompoundStatement):
                return above
        raise PorterError("an expression outside any statement", where=self.where(node))

    def following(self, statement: Statement, root: cst.CSTNode) -> list[Statement]:
        """The statements of `root` that run after a statement, or after those around it."""
        found: list[Statement] = []
        below: cst.CSTNode = statement
        for above in self.ancestors(statement):
            if isinstance(above, cst.IndentedBlock) and below in above.body:
                parts: list[Any] = list(above.body)
                found += parts[parts.index(below) + 1 :]
            if above is root:
                break
            below = above
        return found

    def class_def(self, name: str) -> cst.ClassDef:
        """The top-level class `name`.

        Raises:
            PorterError: there is none.
        """
        for statement in self.tree.body:
            if isinstance(statement, cst.ClassDef) and statement.name.value == name:
                return statement
        raise PorterError(f"no class {name}", expected="it", where=f"{self.file}:1")

    def method(self, class_name: str, name: str) -> cst.FunctionDef | None:
        """Method `name` as the body of the class itself defines it, or None."""
        found = None
        for statement in self.class_def(class_name).body.body:
            if isinstance(statement, cst.FunctionDef) and statement.name.value == name:
                found = statement
        return found


@lru_cache(maxsize=16)
def syntax_tree(text: str) -> ast.Module:
    """A whole file in the form of the standard library, to be read and not changed."""
    return ast.parse(text)


def _blanked(text: str, only: str) -> str:
    """The text with other top-level definitions replaced by empty lines."""
    lines = text.splitlines(keepends=True)
    for node in syntax_tree(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != only:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            for number in range(first - 1, node.end_lineno or first):
                lines[number] = "\n"
    return "".join(lines)


# The library makes the list anew each time, by a visitor.
@lru_cache(maxsize=1 << 18)
def children_of(node: cst.CSTNode) -> tuple[cst.CSTNode, ...]:
    """What a node holds directly, the last first."""
    return tuple(reversed(node.children))


def walk(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    """A node and everything below it, in the order of the source."""
    waiting = [node]
    while waiting:
        each = waiting.pop()
        yield each
        waiting += children_of(each)


def find(node: cst.CSTNode, kind: type[Node]) -> Iterator[Node]:
    """Every node of one kind at or below `node`, in the order of the source."""
    for each in walk(node):
        if isinstance(each, kind):
            yield each


def dotted(node: cst.CSTNode) -> str:
    """`a.b.c` for names and attributes, the empty string for anything else."""
    if isinstance(node, cst.Name):
        return node.value
    if isinstance(node, cst.Attribute):
        left = dotted(node.value)
        return f"{left}.{node.attr.value}" if left else ""
    return ""
