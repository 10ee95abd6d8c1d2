"""Gated residual sums as one operation, where no compiler makes one kernel of them.

before    gate * rows | residual + gated        after     residual + gate * rows
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from xfuser_runtime.cuda.nodes import is_call, replace_call, value_of

_ADDCMUL = torch.ops.aten.addcmul.default
_PRODUCTS = (operator.mul, torch.mul)
#: Calls that add.
SUMS = (operator.add, torch.add)


@dataclass(frozen=True)
class GatedSum:
    """A sum of two tensors of one shape and type, of which one may be multiplied by a gate.

    Args:
        first: the first node that reads what the sum is made of.
        residual: the other term.
        factors: the rows and their gate in any order; the rows alone where there is no gate.
    """

    first: Node
    residual: Node
    factors: tuple[Node, ...]


def add_gated_at_once(graph: Graph) -> None:
    """Let one operation make each sum in `graph` of rows and gated rows, in place."""
    for node in list(graph.nodes):
        found = as_sum(node)
        if found is not None and len(found.factors) == 2:
            replace_call(
                graph, found.first, node, _ADDCMUL, found.residual, *found.factors
            )


def as_sum(node: Any) -> GatedSum | None:
    """The sum that a node is; a product that others read too is a term as any other."""
    if not is_call(node, *SUMS) or len(node.args) != 2 or node.kwargs:
        return None
    whole = value_of(node)
    if whole is None or not whole.is_floating_point():
        return None
    for gated, residual in (node.args, node.args[::-1]):
        if _is_like(residual, whole) and _is_gated(gated, whole):
            return GatedSum(gated, residual, tuple(gated.args))
    if all(_is_like(term, whole) for term in node.args):
        residual, rows = node.args
        return GatedSum(node, residual, (rows,))
    return None


def _is_gated(gated: Any, whole: torch.Tensor) -> bool:
    """Whether a node is a product for one sum alone, of tensors of its type."""
    if not is_call(gated, *_PRODUCTS) or len(gated.users) > 1 or gated.kwargs:
        return False
    factors = [value_of(x) for x in gated.args]
    return all(x is not None and x.dtype == whole.dtype for x in factors) and (
        whole.shape in [x.shape for x in factors if x is not None]
    )


def _is_like(node: Any, whole: torch.Tensor) -> bool:
    value = value_of(node)
    return value is not None and (value.shape, value.dtype) == (
        whole.shape,
        whole.dtype,
    )
