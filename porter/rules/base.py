'''What a rule is.

A rule states what it matches, what it emits, the step of the manual that it carries
out, how many matches it expects and the landmark that the match must stand before or
after. It never writes files and never sees another rule's edits: all edits are computed
on the original tree and `porter.rules.engine` applies them in one pass.

A rule is one file with one class; the file's name is the rule's id::

    """Only the last stage turns tokens back into an image.

    Match:    the first statement after the last block loop, and all that follows it.
    Landmark: after the last block loop.
    Emit:     the same statements under `if is_pipeline_last_stage():`.
    Manual:   2.2
    """

    class LastStageOutput(Rule[TransformerFacts]):
        manual = "2.2"
        summary = "only the last stage turns tokens back into an image"
        imports = (("xfuser_runtime.distributed.parallel_state", "is_pipeline_last_stage"),)

        def edits(self, module: ParsedModule, facts: TransformerFacts) -> list[Edit]:
            first, last = facts.output_statements
            return [
                self.nest(
                    module,
                    first,
                    last,
                    header="if is_pipeline_last_stage():",
                    footer="else:\\n    output = hidden_states",
                )
            ]

The helpers, all of which take nodes of the original tree:

- `self.replace(module, node, text)`: an expression or a whole statement. A statement
  that holds an edited expression is formatted only where a line becomes too long.
- `self.replace_header(module, compound, text)`: the `for ...:` or `if ...:` line(s) of a
  compound statement; its body stays as it is.
- `self.insert_before(module, statement, text)`: above the statement's own comments.
- `self.insert_after(module, statement, text)`.
- `self.remove(module, statement)`: the statement with the comments directly above it.
- `self.nest(module, first, last, header=, footer=)`: moves whole statements one level to
  the right below a header. Edits of other rules inside the range still apply.

`text` is written without indentation; helpers format and indent it. Two edits may not
overlap, unless one of them is a `nest`.

Every edit carries `at`, the line of the construct that matched. The engine counts
distinct values of `at` and compares the count with `expected()`, so give all edits of
one match the same `at=` node (the default is the edited node). Zero or too many matches
is a `RuleError` with file:line, never a silent skip. A rule whose construct is missing
in a legal way says so with `expect = (0, 1)` or by overriding `expected`.

A package of rules lists its classes in `RULES`, in the manual's order; a test compares
the tuple with the folder. Cases live in `tests/cases/<rule>/<case>.py`.
'''

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import libcst as cst

from porter.parsed import ParsedModule, Statement
from porter.rules.format import format_header, format_statements, indent_block

Facts = TypeVar("Facts")
Import = tuple[str, str]
"""(module, name) of `from module import name`."""


@dataclass(frozen=True)
class Edit:
    """One change of the original text.

    Attributes:
        start, end: offsets in characters of the original text; equal for an insertion.
        text: what stands there afterwards; for a nest, the header line.
        rule: id of the rule.
        manual: section of the manual.
        at: line of the construct that matched.
        nest: the lines of start..end move one level to the right.
        footer: for a nest, what follows the range, indented like the header.
        outside: an insertion that stays outside a nest which begins or ends there.
    """

    start: int
    end: int
    text: str
    rule: str
    manual: str
    at: int
    nest: bool = False
    footer: str = ""
    outside: bool = False


class Rule(ABC, Generic[Facts]):
    """A rewrite of one construct; see the module's docstring."""

    manual: ClassVar[str]
    summary: ClassVar[str]
    #: Why the construct has a rule though one class of the library alone needs it.
    reason: ClassVar[str] = ""
    imports: ClassVar[tuple[Import, ...]] = ()
    expect: ClassVar[tuple[int, int]] = (1, 1)

    @property
    def id(self) -> str:
        """The rule's name everywhere: its file name."""
        return type(self).__module__.rpartition(".")[2]

    @abstractmethod
    def edits(self, module: ParsedModule, facts: Facts) -> Sequence[Edit]:
        """All edits of this rule, on the original tree."""

    def expected(self, module: ParsedModule, facts: Facts) -> tuple[int, int]:
        """Fewest and most matches in this module; `expect` unless facts say more."""
        return self.expect

    def replace(
        self,
        module: ParsedModule,
        node: cst.CSTNode,
        text: str,
        *,
        at: cst.CSTNode | None = None,
    ) -> Edit:
        """Puts `text` in the place of an expression or of a whole statement."""
        start, end = module.span(node)
        if isinstance(node, cst.SimpleStatementLine | cst.BaseCompoundStatement):
            text = format_statements(text, module.indentation(node)).lstrip()
        return self._edit(module, start, end, text, at or node)

    def replace_header(
        self,
        module: ParsedModule,
        compound: cst.BaseCompoundStatement,
        text: str,
        *,
        at: cst.CSTNode | None = None,
    ) -> Edit:
        """Puts `text`, which ends in a colon, in the place of the header line(s)."""
        start = module.span(compound)[0]
        first = compound.body.body[0]
        line = module.first_line(first)
        while not module.text[
            module.line_start(line - 1) : module.line_end(line - 1)
        ].strip():
            line -= 1
        end = module.line_end(line - 1)
        text = format_header(text, module.indentation(compound)).lstrip()
        return self._edit(module, start, end, text, at or compound)

    def insert_before(
        self,
        module: ParsedModule,
        statement: Statement,
        text: str,
        *,
        at: cst.CSTNode | None = None,
        blank: bool = False,
    ) -> Edit:
        """Puts statements above a statement and its comments; `blank` adds a line."""
        start = module.line_start(module.first_line(statement))
        text = format_statements(text, module.indentation(statement))
        text += "\n\n" if blank else "\n"
        return self._edit(module, start, start, text, at or statement)

    def insert_after(
        self,
        module: ParsedModule,
        statement: Statement,
        text: str,
        *,
        at: cst.CSTNode | None = None,
        blank: bool = False,
    ) -> Edit:
        """Puts statements below a statement; `blank` adds a line between them."""
        end = module.line_end(module.last_line(statement))
        text = format_statements(text, module.indentation(statement))
        text = ("\n\n" if blank else "\n") + text
        return self._edit(module, end, end, text, at or statement)

    def remove(
        self,
        module: ParsedModule,
        statement: Statement,
        *,
        at: cst.CSTNode | None = None,
    ) -> Edit:
        """Takes a statement away, its newline included."""
        module.indentation(statement)
        start = module.line_start(module.line(statement))
        end = module.line_end(module.last_line(statement)) + 1
        return self._edit(module, start, end, "", at or statement)

    def nest(
        self,
        module: ParsedModule,
        first: Statement,
        last: Statement,
        *,
        header: str,
        footer: str = "",
        at: cst.CSTNode | None = None,
    ) -> Edit:
        """Moves the statements from `first` to `last` below a one-line header.

        Comments above `first` stay above the header.
        """
        indentation = module.indentation(first)
        start = module.line_start(module.line(first))
        end = module.line_end(module.last_line(last))
        return Edit(
            start=start,
            end=end,
            text=f"{indentation}{header}\n",
            rule=self.id,
            manual=self.manual,
            at=module.line(at or first),
            nest=True,
            footer="\n" + indent_block(footer, indentation) if footer else "",
        )

    def _edit(
        self, module: ParsedModule, start: int, end: int, text: str, at: cst.CSTNode
    ) -> Edit:
        return Edit(start, end, text, self.id, self.manual, module.line(at))
