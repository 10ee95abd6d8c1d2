"""Gated residual sums as one operation, where no compiler makes one kernel of them.

before    gate * rows | residual + gated        after     residual + gate * rows
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from xfuser_runtime.cuda.nodes import is_call, replace_call, value_of

_ADDCMUL = torch.ops.aten.addcmul.default
_SUMS, _PRODUCTS = (operator.add, torch.add), (operator.mul, torch.mul)


def add_gated_at_once(graph: Graph) -> None:
    """Let one operation make each sum in `graph` of rows and gated rows, in place."""
    for node in list(graph.nodes):
        if is_call(node, *_SUMS) and len(node.args) == 2 and not node.kwargs:
            for gated, residual in (node.args, node.args[::-1]):
                if _is_gated(gated, residual, node):
                    replace_call(graph, gated, node, _ADDCMUL, residual, *gated.args)
                    break


def _is_gated(gated: Any, residual: Any, result: Node) -> bool:
    """Whether `gated` is a product for this sum alone, of tensors of one type."""
    if not is_call(gated, *_PRODUCTS) or len(gated.users) > 1 or gated.kwargs:
        return False
    whole = value_of(result)
    rows, *factors = (value_of(x) for x in (residual, *gated.args))
    if whole is None or not whole.is_floating_point():
        return False
    return (
        all(x is not None and x.dtype == whole.dtype for x in (rows, *factors))
        and rows.shape == whole.shape
        and whole.shape in [x.shape for x in factors]
    )
