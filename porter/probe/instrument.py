"""A copy of a model's `forward` that reports its local names before each block loop."""

from __future__ import annotations

import importlib
import textwrap
import types
from collections.abc import Callable
from typing import Any

import libcst as cst
from torch import nn

from porter.analysis.block_loops import BlockLoop
from porter.parsed import ParsedModule
from porter.rules.engine import excerpt

Report = Callable[[str, dict[str, Any]], None]
_REPORT = "__report_locals__"


def instrumented_forward(
    module: ParsedModule,
    forward: cst.FunctionDef,
    loops: tuple[BlockLoop, ...],
    model: nn.Module,
    report: Report,
) -> Callable[..., Any]:
    """`model`'s forward, which calls `report(blocks, locals())` before each loop."""
    start, end = excerpt(module, forward)
    text = module.text[start:end]
    # From the end to the start, so that earlier offsets stay right.
    for loop in sorted(loops, key=lambda item: -module.line(item.node)):
        at = module.line_start(module.line(loop.node))
        indentation = module.indentation(loop.node)
        call = f"{indentation}{_REPORT}({loop.blocks!r}, locals())\n"
        text = text[: at - start] + call + text[at - start :]
    namespace = dict(vars(importlib.import_module(module.name)))
    namespace[_REPORT] = report
    exec(compile(textwrap.dedent(text), module.file, "exec"), namespace)
    return types.MethodType(namespace[forward.name.value], model)
