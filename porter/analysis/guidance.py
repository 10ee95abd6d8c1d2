"""Finds where a pipeline makes the guided batch before its loop (manual, 1.1 steps 2, 3).

A name may be cut before the transformer call only if nothing but the call depends on its
batch: every later use is an argument of the call, a cast, or the callback's hand-over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import libcst as cst

from porter.analysis.jumps import statements
from porter.analysis.pipeline_modes import doubled_calls
from porter.analysis.pipeline_source import PipelineSource
from porter.parsed import dotted, find

_FLAGS = ("do_classifier_free_guidance", "self.do_classifier_free_guidance")


@dataclass(frozen=True)
class DoubledNames:
    """Adjacent statements `X = torch.cat([other, X], dim=0)` under one guidance flag.

    Attributes:
        condition: the `if` that holds them.
        statements: the statements.
        pairs: (other, X) of each statement.
    """

    condition: cst.If
    statements: tuple[cst.SimpleStatementLine, ...]
    pairs: tuple[tuple[str, str], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The doubled names, in order."""
        return tuple(name for _, name in self.pairs)


def split_batch(source: PipelineSource) -> DoubledNames | None:
    """The embeddings doubled as (negative, positive) before the loop, or None."""
    for condition in _guidance_conditions(source):
        kept: list[tuple[cst.SimpleStatementLine, tuple[str, str]]] = []
        for part in statements(condition.body):
            pair = _doubling(part)
            if pair and pair[0] != pair[1] and _cut_is_safe(source, condition, pair[1]):
                assert isinstance(part, cst.SimpleStatementLine)
                kept.append((part, pair))
            elif kept:
                break
        if kept:
            parts, pairs = zip(*kept, strict=True)
            return DoubledNames(condition, tuple(parts), tuple(pairs))
    return None


def micro_conditions(source: PipelineSource) -> list[DoubledNames]:
    """The `if`s that do nothing but double conditions that both branches share."""
    found = []
    for condition in _guidance_conditions(source):
        parts = statements(condition.body)
        pairs = [_doubling(part) for part in parts]
        if all(
            pair and pair[0] == pair[1] and _cut_is_safe(source, condition, pair[1])
            for pair in pairs
        ):
            found.append(
                DoubledNames(
                    condition,
                    tuple(p for p in parts if isinstance(p, cst.SimpleStatementLine)),
                    tuple(pair for pair in pairs if pair),
                )
            )
    return found


def _guidance_conditions(source: PipelineSource) -> Iterator[cst.If]:
    for part in source.before:
        for node in find(part, cst.If):
            if dotted(node.test) in _FLAGS and node.orelse is None:
                yield node


def _doubling(part: cst.CSTNode) -> tuple[str, str] | None:
    """(a, b) of `b = torch.cat([a, b])` along dimension 0, else None."""
    if not isinstance(part, cst.SimpleStatementLine) or len(part.body) != 1:
        return None
    small = part.body[0]
    if not isinstance(small, cst.Assign) or len(small.targets) != 1:
        return None
    call, target = small.value, dotted(small.targets[0].target)
    if not isinstance(call, cst.Call) or dotted(call.func) != "torch.cat":
        return None
    parts, *rest = call.args
    if not isinstance(parts.value, cst.List) or not _along_batch(rest):
        return None
    names = [dotted(element.value) for element in parts.value.elements]
    if len(names) == 2 and names[1] == target and all(n.isidentifier() for n in names):
        return names[0], names[1]
    return None


def _along_batch(arguments: Sequence[cst.Arg]) -> bool:
    if not arguments:
        return True
    keyword = arguments[0].keyword
    value = arguments[0].value
    return (
        len(arguments) == 1
        and (keyword is None or keyword.value == "dim")
        and isinstance(value, cst.Integer)
        and value.value == "0"
    )


def _cut_is_safe(source: PipelineSource, condition: cst.If, name: str) -> bool:
    """Whether every use of `name` below `condition` bears this rank's half as well."""
    line = source.module.last_line(condition)
    holders = {name}
    for node in find(source.call.body, cst.Name):
        if source.module.line(node) <= line or node.value not in holders:
            continue
        if holder := _dict_of(source, node):
            holders.add(holder)
        elif not _harmless(source, node):
            return False
    return True


def _dict_of(source: PipelineSource, node: cst.Name) -> str:
    """`d` where the node is a value of the literal in `d = {...}`."""
    element = source.module.parent(node)
    literal = source.module.parent(element) if element is not None else None
    assign = source.module.parent(literal) if literal is not None else None
    if (
        isinstance(element, cst.DictElement)
        and element.value is node
        and isinstance(assign, cst.Assign)
    ):
        return dotted(assign.targets[0].target)
    return ""


def _harmless(source: PipelineSource, node: cst.Name) -> bool:
    above = source.module.parent(node)
    if isinstance(above, cst.Attribute):
        if above.attr is node or above.attr.value in ("dtype", "device"):
            return True
        return above.attr.value == "to" and _rebinds(source, above, node.value)
    if isinstance(above, cst.Arg):
        if above.keyword is node:
            return True
        call = source.module.parent(above)
        assert isinstance(call, cst.Call)
        if dotted(call.func) in source.denoisers:
            # Further calls on one branch alone get what upstream gives them.
            loop = source.denoising
            doubled = doubled_calls(source.module, loop) if loop else ()
            return call in [each.call for each in doubled]
        return dotted(call.func).endswith(".pop") and _rebinds(source, call, node.value)
    if isinstance(above, cst.AssignTarget):
        assign = source.module.parent(above)
        if not isinstance(assign, cst.Assign) or not isinstance(assign.value, cst.Call):
            return False
        called = dotted(assign.value.func)
        return called == f"{node.value}.to" or called.endswith(".pop")
    return False


def _rebinds(source: PipelineSource, node: cst.CSTNode, name: str) -> bool:
    """Whether the statement around `node` is `name = ...`."""
    for above in source.module.ancestors(node):
        if isinstance(above, cst.Assign):
            return [dotted(target.target) for target in above.targets] == [name]
    return False
