"""A stage runs its own blocks only.

Match:    the block calls of each region, with the gradient-checkpoint branch before them.
Emit:     the call under `if region.owns(block):`; the checkpoint branch, which never runs
          under inference, is gone but for its comments.
Manual:   2 (in the manual the block list is cut instead)

The block list keeps its length and the rest of the body runs on every stage, because
upstream's bodies count blocks and read their flags.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import libcst as cst

from porter.analysis.block_loops import BlockCall, BlockLoop
from porter.analysis.forward import Forward
from porter.errors import RuleError
from porter.parsed import ParsedModule, find, walk
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
        edits: list[Edit] = []
        around: list[cst.If] = []
        for loop, _ in facts.regions:
            at = loop.calls[0].statement
            inside = {part for test in loop.checkpoints for part in walk(test)}
            for test in loop.checkpoints:
                edits.append(self._without_checkpoint(module, loop, test, at))
            for call in loop.calls:
                if call.statement not in inside:
                    edits.extend(self._guarded(module, loop, call, at))
            if loop.around is not None and loop.around not in around:
                around.append(loop.around)
                edits.append(self._without_twin(module, loop, at))
        return edits

    def _guarded(
        self, module: ParsedModule, loop: BlockLoop, call: BlockCall, at: cst.CSTNode
    ) -> Iterator[Edit]:
        yield self.nest(
            module,
            call.statement,
            call.statement,
            header=f"if region.owns({loop.block}):",
            at=at,
        )
        if call.choice is not None:
            start, end = module.span(call.choice)[0], module.span(call.choice.orelse)[0]
            yield self._edit(module, start, end, "", at)

    def _without_twin(
        self, module: ParsedModule, loop: BlockLoop, at: cst.CSTNode
    ) -> Edit:
        """`if <checkpoint>: <twin loop> else:` becomes `with region:`, which changes nothing
        but keeps the indentation, and with it the lines, of the loop that runs."""
        assert loop.around is not None
        return self._header_of_other_branch(module, loop.around, "with region:", at)

    def _without_checkpoint(
        self, module: ParsedModule, loop: BlockLoop, test: cst.If, at: cst.CSTNode
    ) -> Edit:
        """`if <checkpoint>: ... else:` becomes the guard; the else branch stays as it is."""
        guard = f"region.owns({loop.block})"
        branch = test.orelse
        if isinstance(branch, cst.If) and branch.orelse is None:
            guard += f" and {module.source(branch.test)}"
        return self._header_of_other_branch(module, test, f"if {guard}:", at)

    def _header_of_other_branch(
        self, module: ParsedModule, test: cst.If, header: str, at: cst.CSTNode
    ) -> Edit:
        """Everything from `if` to the line before the other branch's body is `header`.

        Comments in what is dropped stand above it.
        """
        branch = test.orelse
        if branch is None or (isinstance(branch, cst.If) and branch.orelse is not None):
            raise RuleError(
                "a checkpoint test with no plain other branch",
                expected="else or elif with the block call",
                where=module.where(test),
            )
        first = branch.body.body[0]
        assert isinstance(first, cst.SimpleStatementLine | cst.BaseCompoundStatement)
        start = module.span(test)[0]
        end = module.line_start(module.first_line(first)) - 1
        kept = [
            comment.value
            for comment in find(test, cst.Comment)
            if start <= module.span(comment)[0] < end
        ]
        text = ("\n" + module.indentation(test)).join([*kept, header])
        return self._edit(module, start, end, text, at)
