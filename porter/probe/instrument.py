"""A copy of a model's `forward` that reports its local names at loops and statements."""

from __future__ import annotations

import functools
import importlib
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import libcst as cst
from torch import nn

from porter.analysis.block_loops import BlockLoop
from porter.parsed import ParsedModule
from porter.rules.engine import excerpt
from porter.scope import writes

Report = Callable[[str, dict[str, Any]], None]
Swap = Callable[[str, str, Any], Any]
TailReport = Callable[[int, dict[str, Any], dict[str, Any]], None]

_BEFORE = "__report_before__"
_INSIDE = "__report_inside__"
_SWAP = "__swap_local__"
_TAIL = "__report_tail__"


@dataclass(frozen=True)
class Probes:
    """What an instrumented `forward` calls.

    Attributes:
        before: called with (blocks, locals) before each loop.
        inside: called likewise at the end of each iteration; None for never.
        swap: called before each loop with (blocks, name, value) of every name that the
            loop reads or carries; what it returns takes the value's place.  None for never.
        tail: called with (index, locals, globals) before each statement of a tail and, with
            their number, after the last; None for never.
    """

    before: Report
    inside: Report | None = None
    swap: Swap | None = None
    tail: TailReport | None = None


def instrumented_forward(
    module: ParsedModule,
    forward: cst.FunctionDef,
    loops: tuple[BlockLoop, ...],
    model: nn.Module,
    probes: Probes,
    tail: Sequence[cst.SimpleStatementLine] = (),
) -> Callable[..., Any]:
    """`model`'s forward, which calls `probes` at each loop and at the statements `tail`."""
    start, end = excerpt(module, forward)
    text = module.text[start:end]
    added = [part for loop in loops for part in _lines(module, forward, loop, probes)]
    added += _tail_lines(module, tail)
    # From the end to the start, so that earlier offsets stay right.
    for at, line in sorted(added, key=lambda item: -item[0]):
        text = text[: at - start] + line + text[at - start :]
    namespace = dict(vars(importlib.import_module(module.name)))
    namespace |= {_BEFORE: probes.before, _INSIDE: probes.inside, _SWAP: probes.swap}
    namespace[_TAIL] = probes.tail
    exec(_compiled(text, module.file), namespace)
    return types.MethodType(namespace[forward.name.value], model)


@functools.lru_cache(maxsize=32)
def _compiled(text: str, file: str) -> types.CodeType:
    return compile(textwrap.dedent(text), file, "exec")


def _lines(
    module: ParsedModule, forward: cst.FunctionDef, loop: BlockLoop, probes: Probes
) -> Iterator[tuple[int, str]]:
    """(offset, line) of what stands before one loop and at the end of its body."""
    indentation = module.indentation(loop.node)
    before = f"{indentation}{_BEFORE}({loop.blocks!r}, locals())\n"
    if probes.swap is not None:
        bound = {parameter.name.value for parameter in forward.params.params}
        bound.update(*(writes(module, part) for part in forward.body.body))
        for name in sorted({*loop.reads, *loop.carried} & bound):
            before += (
                f"{indentation}if {name!r} in locals(): "
                f"{name} = {_SWAP}({loop.blocks!r}, {name!r}, {name})\n"
            )
    yield module.line_start(module.line(loop.node)), before
    if probes.inside is not None:
        last = loop.node.body.body[-1]
        indentation = module.indentation(last)
        line = f"\n{indentation}{_INSIDE}({loop.blocks!r}, locals())"
        yield module.line_end(module.last_line(last)), line


def _tail_lines(
    module: ParsedModule, tail: Sequence[cst.SimpleStatementLine]
) -> Iterator[tuple[int, str]]:
    """(offset, line) of what stands before each statement of a tail and after the last."""
    for index, statement in enumerate(tail):
        indentation = module.indentation(statement)
        line = f"{indentation}{_TAIL}({index}, locals(), globals())\n"
        yield module.line_start(module.line(statement)), line
    if tail:
        indentation = module.indentation(tail[-1])
        line = f"\n{indentation}{_TAIL}({len(tail)}, locals(), globals())"
        yield module.line_end(module.last_line(tail[-1])), line
