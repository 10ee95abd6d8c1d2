"""A transformer's `forward` as its rules see it: source, block loops and facts together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import libcst as cst

from porter.analysis.block_loops import BlockLoop, find_block_loops, find_method
from porter.analysis.facts import LoopFacts, TransformerFacts
from porter.parsed import ParsedModule, Statement


@dataclass(frozen=True)
class Forward:
    """What the rules for one transformer class work on.

    Attributes:
        module: the upstream module.
        class_name: the transformer class.
        facts: what the probe measured.
    """

    module: ParsedModule
    class_name: str
    facts: TransformerFacts

    @cached_property
    def method(self) -> cst.FunctionDef:
        """The `forward` that the class defines."""
        owner = self.module.class_def(self.class_name)
        return find_method(self.module, owner, "forward")

    @cached_property
    def regions(self) -> tuple[tuple[BlockLoop, LoopFacts], ...]:
        """The loops that become regions, with their facts, in order."""
        facts = {loop.blocks: loop for loop in self.facts.loops}
        return tuple(
            (loop, facts[loop.blocks])
            for loop in find_block_loops(self.module, self.method)
            if loop.blocks in facts
        )

    @cached_property
    def before_regions(self) -> tuple[Statement, ...]:
        """Top-level statements of `forward` before the first region."""
        return tuple(self._top_level[: self._top_level.index(self._holder(0))])

    @cached_property
    def after_regions(self) -> tuple[Statement, ...]:
        """Top-level statements of `forward` after the last region."""
        return tuple(self._top_level[self._top_level.index(self._holder(-1)) + 1 :])

    @cached_property
    def _top_level(self) -> list[Statement]:
        return [
            statement
            for statement in self.method.body.body
            if isinstance(
                statement, cst.SimpleStatementLine | cst.BaseCompoundStatement
            )
        ]

    def _holder(self, index: int) -> Statement:
        """The top-level statement that holds region `index`."""
        node: cst.CSTNode = self.regions[index][0].node
        around = {node, *self.module.ancestors(node)}
        return next(statement for statement in self._top_level if statement in around)
