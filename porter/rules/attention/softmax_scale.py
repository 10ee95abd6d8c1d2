"""A softmax scale that follows the number of tokens follows that of all ranks.

Match:    in the processor's `__call__`, a name bound by unpacking a `.shape` that an
          expression of the attention call's `scale` reads; the probe measured that the
          scale differs on part of the tokens.
Emit:     the attention module's count of all tokens in place of the name.
Manual:   4
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import libcst as cst

from porter.analysis.processor import Processor
from porter.parsed import ParsedModule, find, walk
from porter.rules.base import Edit, Rule


class SoftmaxScale(Rule[Processor]):
    """Replaces the local token count where the scale is computed."""

    manual = "4"
    summary = "a softmax scale counts the tokens of all ranks"
    reason = (
        "without it the scale is silently another on each rank, and the class has no "
        "other obstacle to split tokens"
    )

    def expected(self, module: ParsedModule, facts: Processor) -> tuple[int, int]:
        """At least one match where the scale was measured to count tokens."""
        return (1, 9) if facts.scales else (0, 0)

    def edits(self, module: ParsedModule, facts: Processor) -> Sequence[Edit]:
        """One edit a read of a count."""
        if not facts.scales:
            return []
        counts = _counts(facts.method)
        return [
            self.replace(
                module, node, f"{facts.attention}.count_all_tokens({node.value})"
            )
            for value in _scale_values(facts.method)
            for node in walk(value)
            if isinstance(node, cst.Name) and node.value in counts
        ]


def _counts(method: cst.FunctionDef) -> set[str]:
    """Names at the second place of `a, b, c = x.shape`: tokens of (B, S, D)."""
    names = set()
    for assign in find(method, cst.Assign):
        target = assign.targets[0].target
        if (
            isinstance(target, cst.Tuple)
            and len(target.elements) == 3
            and isinstance(assign.value, cst.Attribute)
            and assign.value.attr.value == "shape"
            and isinstance(target.elements[1].value, cst.Name)
        ):
            names.add(target.elements[1].value.value)
    return names


def _scale_values(method: cst.FunctionDef) -> Iterator[cst.BaseExpression]:
    """Expressions that the `scale=` of an attention call is made of."""
    wanted: list[str] = []
    for argument in find(method, cst.Arg):
        if argument.keyword is not None and argument.keyword.value == "scale":
            yield argument.value
            wanted += _names(argument.value)
    seen: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        for assign in find(method, cst.Assign):
            target = assign.targets[0].target
            if isinstance(target, cst.Name) and target.value == name:
                yield assign.value
                wanted += _names(assign.value)


def _names(value: cst.BaseExpression) -> list[str]:
    return [node.value for node in walk(value) if isinstance(node, cst.Name)]
