"""A stage runs its own blocks only.

Match:    the block call of each region, with the gradient-checkpoint branch before it.
Emit:     the call under `if region.owns(block):`; the checkpoint branch, which never runs
          under inference, is gone.
Manual:   2 (in the manual the block list is cut instead)

The block list keeps its length and the rest of the body runs on every stage, because
upstream's bodies count blocks and read their flags.
"""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst

from porter.analysis.block_loops import BlockLoop
from porter.analysis.forward import Forward
from porter.errors import RuleError
from porter.parsed import ParsedModule, Statement
from porter.rules.base import Edit, Rule


class BlockGuard(Rule[Forward]):
    """Guards each block call and drops the checkpoint branch."""

    manual = "2"
    summary = "a stage runs its own blocks only"

    def expected(self, module: ParsedModule, facts: Forward) -> tuple[int, int]:
        """One match a region."""
        return len(facts.regions), len(facts.regions)

    def edits(self, module: ParsedModule, facts: Forward) -> Sequence[Edit]:
        """One guard a loop, and one removal where the whole loop has a checkpoint twin."""
        edits = []
        for loop, _ in facts.regions:
            if loop.checkpoint is not None:
                edits.append(self._without_checkpoint(module, loop))
            else:
                edits.append(
                    self.nest(
                        module,
                        loop.call,
                        loop.call,
                        header=f"if region.owns({loop.block}):",
                        at=loop.call,
                    )
                )
            if loop.around is not None:
                raise RuleError(
                    "a checkpoint branch around a block loop",
                    expected="one inside the loop",
                    where=module.where(loop.around),
                )
        return edits

    def _without_checkpoint(self, module: ParsedModule, loop: BlockLoop) -> Edit:
        """`if <checkpoint>: ... else:` becomes the guard; the else branch stays as it is."""
        test = loop.checkpoint
        assert test is not None
        guard = f"region.owns({loop.block})"
        branch = test.orelse
        if isinstance(branch, cst.If) and branch.orelse is None:
            guard += f" and {module.source(branch.test)}"
        elif not isinstance(branch, cst.Else):
            raise RuleError(
                "a checkpoint test with no plain other branch",
                expected="else or elif with the block call",
                where=module.where(test),
            )
        first = branch.body.body[0]
        assert isinstance(first, cst.SimpleStatementLine | cst.BaseCompoundStatement)
        end = module.line_start(_first_text_line(module, first)) - 1
        start = module.span(test)[0]
        return self._edit(module, start, end, f"if {guard}:", loop.call)


def _first_text_line(module: ParsedModule, statement: Statement) -> int:
    """The line where a statement or its comments begin."""
    return module.first_line(statement)
