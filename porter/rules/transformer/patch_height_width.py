"""Height and width in tokens come from the runtime state.

Match:    an assignment of two names to the last two sizes of an input, each divided by
          `self.config.patch_size`.
Landmark: before the first block loop.
Emit:     `height, width = self._get_patch_height_width()`.
Manual:   2.2

Our tail works on whole buffers, so the runtime answers with the whole image, where the
manual's answers with the patch.
"""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst

from porter.analysis.forward import Forward
from porter.parsed import ParsedModule, dotted
from porter.rules.base import Edit, Rule


class PatchHeightWidth(Rule[Forward]):
    """Replaces `x.shape[-2] // patch_size, x.shape[-1] // patch_size`."""

    manual = "2.2"
    summary = "height and width in tokens come from the runtime state"
    expect = (0, 1)

    def edits(self, module: ParsedModule, facts: Forward) -> Sequence[Edit]:
        """One edit where the assignment exists."""
        return [
            self.replace(
                module, statement, f"{targets} = self._get_patch_height_width()"
            )
            for statement in facts.before_regions
            if (targets := _targets_of_sizes(module, statement))
        ]


def _targets_of_sizes(module: ParsedModule, statement: cst.CSTNode) -> str:
    """The targets of an assignment of the two sizes, else the empty string."""
    if not isinstance(statement, cst.SimpleStatementLine):
        return ""
    assign = statement.body[0]
    if not isinstance(assign, cst.Assign) or not isinstance(assign.value, cst.Tuple):
        return ""
    found = [_size_of(element.value) for element in assign.value.elements]
    return module.source(assign.targets[0].target) if found == [-2, -1] else ""


def _size_of(node: cst.BaseExpression) -> int | None:
    """The negative dimension d of `<name>.shape[d] // self.config.patch_size`."""
    if not (
        isinstance(node, cst.BinaryOperation)
        and isinstance(node.operator, cst.FloorDivide)
        and dotted(node.right) == "self.config.patch_size"
        and isinstance(node.left, cst.Subscript)
        and dotted(node.left.value).endswith(".shape")
        and len(node.left.slice) == 1
    ):
        return None
    index = node.left.slice[0].slice
    if isinstance(index, cst.Index):
        text = cst.Module([]).code_for_node(index.value)
        return int(text) if text.lstrip("-").isdigit() else None
    return None
