"""Finds the statements right after a block loop that may map each token by itself.

They are found by syntax alone; `porter.probe.tail` runs them on part of the tokens and says
which of them do.
"""

from __future__ import annotations

import libcst as cst

from porter.analysis.block_loops import BlockLoop
from porter.parsed import ParsedModule, Statement, find
from porter.scope import read_first, reads, writes


def tail_statements(
    module: ParsedModule, forward: cst.FunctionDef, loop: BlockLoop, stream: str
) -> tuple[cst.SimpleStatementLine, ...]:
    """The statements of the tail that touch what a loop makes of `stream`, in order.

    Between them may stand others, which touch nothing of it. The last is the one before the
    first that is no plain assignment, or that takes a part out of what it reads.

    Args:
        module: the upstream module.
        forward: the method that holds the loop.
        loop: one that stands on the top level of it, alone or beside its checkpoint twin;
            of another, whose gather some calls may not reach, there is no tail.
        stream: the carried name.
    """
    held = {stream}
    found: list[cst.SimpleStatementLine] = []
    for statement in _after(module, forward, loop):
        if next(find(statement, cst.Return), None) is not None:
            break
        read, written = reads(module, statement), writes(module, statement)
        if not (read | written) & held:
            continue
        if not _assigns(statement) or _takes_a_part(module, statement, held):
            break
        assert isinstance(statement, cst.SimpleStatementLine)
        found.append(statement)
        held |= written
    return tuple(found)


def read_after(
    module: ParsedModule, forward: cst.FunctionDef, statement: Statement
) -> set[str]:
    """Names whose value the code after a statement reads."""
    return read_first(module, module.following(statement, forward))


def _after(
    module: ParsedModule, forward: cst.FunctionDef, loop: BlockLoop
) -> list[Statement]:
    """The top-level statements that every run of the loop is followed by."""
    top = list(forward.body.body)
    after = module.following(loop.node, forward)
    holder = loop.around or loop.node
    return after if holder in top and all(part in top for part in after) else []


def _assigns(statement: Statement) -> bool:
    """True for one assignment to one name or to a tuple of names."""
    if not isinstance(statement, cst.SimpleStatementLine) or len(statement.body) != 1:
        return False
    assign = statement.body[0]
    if not isinstance(assign, cst.Assign) or len(assign.targets) != 1:
        return False
    target = assign.targets[0].target
    if isinstance(target, cst.Tuple):
        return all(isinstance(item.value, cst.Name) for item in target.elements)
    return isinstance(target, cst.Name)


def _takes_a_part(module: ParsedModule, statement: Statement, held: set[str]) -> bool:
    """True where an index or a slice is taken of something made of these names.

    A slice may take all tokens of the calls that are measured and not all of another's.
    """
    return any(
        reads(module, node.value) & held for node in find(statement, cst.Subscript)
    )
