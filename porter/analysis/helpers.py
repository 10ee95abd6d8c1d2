"""Finds the calls of other models that feed the transformer's call alone."""

from __future__ import annotations

from collections.abc import Iterable

import libcst as cst

from porter.analysis.denoising import DenoisingLoop
from porter.parsed import ParsedModule, dotted, find


def helper_calls(
    module: ParsedModule, loop: DenoisingLoop, helpers: Iterable[str]
) -> dict[cst.Call, str]:
    """The calls of `helpers` in the loop, with the helper's name; empty unless there is one
    transformer call, and nothing but its arguments reads what they are bound to.

    Args:
        module: the file.
        loop: the denoising loop.
        helpers: attributes of the pipeline.
    """
    found: dict[cst.Call, str] = {}
    if len(loop.calls) != 1:
        return found
    for helper in helpers:
        calls = [
            node
            for node in find(loop.loop.body, cst.Call)
            if dotted(node.func) == f"self.{helper}"
        ]
        if not calls or not all(_feeds_transformer(module, loop, c) for c in calls):
            return {}
        found |= dict.fromkeys(calls, helper)
    return found


def _feeds_transformer(
    module: ParsedModule, loop: DenoisingLoop, call: cst.Call
) -> bool:
    assign = module.parent(call)
    if not isinstance(assign, cst.Assign) or len(assign.targets) != 1:
        return False
    target = assign.targets[0].target
    given = set(loop.calls[0].call.args)
    uses = [
        node
        for node in find(loop.loop.body, cst.Name)
        if node.value == dotted(target) and node is not target
    ]
    return bool(dotted(target)) and all(
        isinstance(above := module.parent(node), cst.Arg) and above in given
        for node in uses
    )
