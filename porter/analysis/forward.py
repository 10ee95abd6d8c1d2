"""A transformer's `forward` as its rules see it: source, block loops and facts together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import libcst as cst

from porter.analysis.block_loops import BlockLoop, find_block_loops, find_method
from porter.analysis.facts import LoopFacts, TransformerFacts
from porter.parsed import ParsedModule, Statement, dotted, walk


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
    def block_parts(self) -> dict[str, tuple[str, ...]]:
        """What `forward` reads of single blocks outside of the regions, by block's path."""
        inside = {node for loop, _ in self.regions for node in walk(loop.node)}
        lists = {loop.blocks for loop, _ in self.regions}
        found: dict[str, set[str]] = {}
        for node in walk(self.method):
            if (
                isinstance(node, cst.Attribute)
                and node not in inside
                and not isinstance(self.module.parent(node), cst.Attribute)
            ):
                block, path = _block_and_path(node)
                if block.partition(".")[0] in lists:
                    found.setdefault(block, set()).add(path)
        return {block: tuple(sorted(paths)) for block, paths in found.items()}

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


def _block_and_path(node: cst.Attribute) -> tuple[str, str]:
    """("blocks.0", "norm.linear") of `self.blocks[0].norm.linear`, else empty strings."""
    names: list[str] = []
    base: cst.BaseExpression = node
    while isinstance(base, cst.Attribute):
        names.insert(0, base.attr.value)
        base = base.value
    if not isinstance(base, cst.Subscript) or len(base.slice) != 1:
        return "", ""
    blocks, index = dotted(base.value), base.slice[0].slice
    if not (
        blocks.startswith("self.")
        and isinstance(index, cst.Index)
        and isinstance(index.value, cst.Integer)
    ):
        return "", ""
    return f"{blocks.removeprefix('self.')}.{index.value.value}", ".".join(names)
