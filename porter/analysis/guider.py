"""Reads the loop over what a guider object wants computed in a step.

diffusers' guiders make one entry for each branch of guidance; the pipeline calls the
transformer once an entry, stores the output in the entry and lets the guider combine them::

    for entry in entries:
        entry.noise_pred = self.transformer(...)[0]
    noise_pred = self.guider(entries)[0]
"""

from __future__ import annotations

from dataclasses import dataclass

import libcst as cst

from porter.analysis.denoising import DenoisingLoop, TransformerCall
from porter.parsed import ParsedModule, dotted, find
from porter.scope import carried


@dataclass(frozen=True)
class GuiderLoop:
    """The loop over a guider's entries.

    Attributes:
        loop: the `for` statement.
        call: the transformer's call in it.
        attribute: what each entry keeps the output in.
        guider: the expression that combines the entries.
        combined: the statement that does.
    """

    loop: cst.For
    call: TransformerCall
    attribute: str
    guider: str
    combined: cst.SimpleStatementLine


def guider_loop(module: ParsedModule, denoising: DenoisingLoop) -> GuiderLoop | None:
    """The loop over a guider's entries, None where there is no such loop.

    The entries must be independent: nothing of one reaches the next in the loop.
    """
    if len(denoising.calls) != 1 or not denoising.calls[0].inner_loop:
        return None
    call = denoising.calls[0]
    loops = [
        n for n in module.ancestors(call.call) if isinstance(n, cst.For | cst.While)
    ]
    inner, outer = loops[0], loops[1]
    if not isinstance(inner, cst.For) or outer is not denoising.loop:
        return None
    entry, entries = dotted(inner.target), dotted(inner.iter)
    stored = _attributes(inner, entry)
    if not entries or len(stored) != 1 or carried(module, inner.body.body):
        return None
    for part in denoising.body:
        for node in find(part, cst.Call):
            name = dotted(node.func)
            given = [dotted(argument.value) for argument in node.args]
            statement = module.statement(node)
            below = module.line(node) > module.last_line(inner)
            if below and name and given == [entries]:
                assert isinstance(statement, cst.SimpleStatementLine)
                return GuiderLoop(inner, call, stored.pop(), name, statement)
    return None


def _attributes(loop: cst.For, entry: str) -> set[str]:
    """Attributes of the entry that the loop stores into; none where it reads one back."""
    targets = {
        target.target
        for assign in find(loop.body, cst.Assign)
        for target in assign.targets
        if isinstance(target.target, cst.Attribute)
        and dotted(target.target.value) == entry
    }
    names = {target.attr.value for target in targets}
    read = {
        node.attr.value
        for node in find(loop.body, cst.Attribute)
        if dotted(node.value) == entry and node not in targets
    }
    return set() if names & read else names
