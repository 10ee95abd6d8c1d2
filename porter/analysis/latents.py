"""What a denoising loop steps by its schedulers and carries from step to step."""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst

from porter.parsed import ParsedModule, Statement, dotted, find
from porter.scope import carried, reads, writes


def scheduler_steps(module: ParsedModule, node: cst.CSTNode) -> list[cst.Call]:
    """Calls of `step` of something that is named a scheduler."""
    return [
        each
        for each in find(node, cst.Call)
        if isinstance(each.func, cst.Attribute)
        and each.func.attr.value == "step"
        and "scheduler" in module.source(each.func.value)
    ]


def carried_latents(
    module: ParsedModule, loop: cst.For, body: Sequence[Statement]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The carried names that scheduler steps end in, and those that are stored into."""
    targets: dict[str, bool] = {}
    for step in scheduler_steps(module, loop.body):
        small = next(
            (a for a in module.ancestors(step) if isinstance(a, cst.Assign)), None
        )
        if small is None:
            continue
        target: cst.CSTNode = small.targets[0].target
        if isinstance(target, cst.Tuple):
            target = target.elements[0].value
        if isinstance(target, cst.Subscript):
            targets[dotted(target.value)] = True
        else:
            targets.setdefault(dotted(target), False)
    kept = carried(module, body)
    latents = [n for n, stored in targets.items() if n in kept or stored]
    # A result may be put together with other parts before it becomes the latents.
    derived = _derived(module, body, set(targets) - set(latents)) & kept
    latents += sorted(derived - set(latents))
    stored = {
        dotted(target.target.value)
        for part in body
        for target in find(part, cst.AssignTarget)
        if isinstance(target.target, cst.Subscript)
    }
    return tuple(latents), tuple(name for name in latents if name in stored)


def _derived(
    module: ParsedModule, body: Sequence[Statement], names: set[str]
) -> set[str]:
    """Names bound below the scheduler's step from what depends on `names`."""
    first = next(i for i, part in enumerate(body) if scheduler_steps(module, part))
    derived = set(names)
    for part in body[first:]:
        for small in find(part, cst.SimpleStatementLine):
            if reads(module, small) & derived:
                derived |= writes(module, small)
    return derived - names
