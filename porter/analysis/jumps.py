"""Jumps of a denoising loop: a `continue` that leaves a step out, a `break` on interruption."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import libcst as cst

from porter.parsed import ParsedModule, Statement
from porter.scope import carried, reads, writes


@dataclass(frozen=True)
class Jumps:
    """The tests that lead to a jump.

    Attributes:
        skips: those of the body under which it leaves the step out.
        stops: those of the tail under which the loop ends early.
        others: jumps that passes could take differently.
    """

    skips: tuple[cst.If, ...]
    stops: tuple[cst.If, ...]
    others: tuple[cst.Continue | cst.Break, ...]


def statements(block: cst.BaseSuite) -> list[Statement]:
    """The statements of an indented block."""
    return [
        part
        for part in block.body
        if isinstance(part, cst.SimpleStatementLine | cst.BaseCompoundStatement)
    ]


def sorted_jumps(
    module: ParsedModule,
    jumps: Iterable[cst.Continue | cst.Break],
    body: Sequence[Statement],
    tail: Sequence[Statement],
    latents: Collection[str],
) -> Jumps:
    """The jumps by what they do.

    Args:
        module: the file.
        jumps: all jumps of the loop but those of the interrupt check at its top.
        body: the statements of a pass.
        tail: the statements after a step's last pass.
        latents: the names that the loop carries.
    """
    skips: list[cst.If] = []
    stops: list[cst.If] = []
    others: list[cst.Continue | cst.Break] = []
    for jump in jumps:
        test = next((a for a in module.ancestors(jump) if isinstance(a, cst.If)), None)
        if test is not None and _leaves_step_out(module, test, body, latents):
            skips.append(test)
        elif test is not None and _ends_by_interrupt(module, test, tail):
            stops.append(test)
        else:
            others.append(jump)
    return Jumps(tuple(skips), tuple(stops), tuple(others))


def _leaves_step_out(
    module: ParsedModule,
    test: cst.If,
    body: Sequence[Statement],
    latents: Collection[str],
) -> bool:
    """Whether `if ...: continue` leaves the whole step out, alike on every rank.

    It stands above everything that depends on the latents, so all ranks decide alike, and
    it changes nothing that the loop carries.
    """
    if test not in body or test.orelse is not None:
        return False
    last = statements(test.body)[-1]
    if not isinstance(last, cst.SimpleStatementLine) or len(last.body) != 1:
        return False
    above = body[: list(body).index(test)]
    return (
        isinstance(last.body[0], cst.Continue)
        and not any(set(latents) & reads(module, part) for part in (*above, test))
        and not writes(module, test) & {*latents, *carried(module, body)}
    )


def _ends_by_interrupt(
    module: ParsedModule, test: cst.If, tail: Sequence[Statement]
) -> bool:
    """Whether `if self.interrupt: break` of the tail is all that a jump is under."""
    inside = any(part is test or part in module.ancestors(test) for part in tail)
    only = statements(test.body)
    return (
        inside
        and "interrupt" in module.source(test.test)
        and test.orelse is None
        and len(only) == 1
        and module.source(only[0]).strip() == "break"
    )
