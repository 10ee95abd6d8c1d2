"""Imports inside a processor's method name their module in full.

Match:    relative imports in the body of `__call__`.
Emit:     the same imports from the absolute module; the generated file stands elsewhere.
Manual:   4
"""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst

from porter.analysis.processor import Processor
from porter.parsed import ParsedModule, dotted, find
from porter.rules.base import Edit, Rule


class AbsoluteImports(Rule[Processor]):
    """Rewrites `from ..x import y` inside the method."""

    manual = "4"
    summary = "imports inside the method name their module in full"
    expect = (0, 9)

    def edits(self, module: ParsedModule, facts: Processor) -> Sequence[Edit]:
        """One edit an import."""
        return [
            self.replace(module, module.statement(node), _absolute(module, node))
            for node in find(facts.method, cst.ImportFrom)
            if node.relative
        ]


def _absolute(module: ParsedModule, node: cst.ImportFrom) -> str:
    package = module.name.split(".")[: -len(node.relative)]
    tail = dotted(node.module) if node.module is not None else ""
    source = ".".join([*package, *([tail] if tail else [])])
    names = module.source(node).split(" import ", 1)[1]
    return f"from {source} import {names}"
