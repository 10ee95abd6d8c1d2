"""Layer norms with the shift and scale of a condition, as one kernel.

The compiler reads a row twice, once for its moments; a kernel that holds a row in registers reads it
once. It takes the place of norms whose rows lie in memory already: what computes them otherwise
is one kernel with the norm.

Shapes: B samples, S tokens, C channels.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from xfuser_runtime.cuda.kernel import empty_joined, kernel
from xfuser_runtime.cuda.nodes import argument, is_call, replace_call, value_of


def modulate_at_once(graph: Graph, *, with_computed_rows: bool = False) -> None:
    """Let one operation make each modulated norm in `graph`, in place.

    Args:
        graph: of a block.
        with_computed_rows: of rows that the block computes, too.
    """
    target = torch.ops.xfuser_kernels.modulated_norm.default
    for node in list(graph.nodes):
        found = _as_modulated_norm(node)
        if found is None:
            continue
        parts = found.arguments[0]
        if with_computed_rows or all(part.op == "placeholder" for part in parts):
            replace_call(graph, found.first, node, target, *found.arguments)


@kernel("modulated_norm", fake=lambda parts, *_: empty_joined(parts, 1))
def modulated_norm(
    parts: Sequence[torch.Tensor],
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """`layer_norm(rows) * (1 + scale) + shift` of the joined rows: (B, S, C).

    Args:
        parts: (B, S_i, C), to be joined by tokens.
        scale, shift: (B, 1, C) or (1, 1, C).
        eps: of the norm.
    """
    if parts[0].is_cuda:
        from xfuser_runtime.cuda.norm_kernel import launch

        return launch(parts, scale, shift, eps)
    rows = torch.cat(list(parts), dim=1)
    return F.layer_norm(rows, rows.shape[-1:], eps=eps) * (1 + scale) + shift


@dataclass(frozen=True)
class _ModulatedNorm:
    """A norm with shift and scale: the first node that reads its rows, and the arguments."""

    first: Node
    arguments: tuple[list[Node], Node, Node, float]


def _as_modulated_norm(node: Any) -> _ModulatedNorm | None:
    """The modulated norm that a node is."""
    if not is_call(node, operator.add):
        return None
    product, shift = node.args
    if not is_call(product, operator.mul):
        return None
    norm, factor = product.args
    if not (is_call(norm, F.layer_norm) and is_call(factor, operator.add)):
        return None
    one, scale = factor.args
    rows, eps = argument(norm, 0, "input"), argument(norm, 4, "eps", 1e-5)
    affine = [argument(norm, 2, "weight"), argument(norm, 3, "bias")]
    if one != 1 or affine != [None, None]:
        return None
    if not _is_of(node, rows, scale, shift, argument(norm, 1, "normalized_shape")):
        return None
    first, parts = norm, [rows]
    if is_call(rows, torch.cat) and argument(rows, 1, "dim", 0) == 1:
        first, parts = rows, list(argument(rows, 0, "tensors"))
    return _ModulatedNorm(first, (parts, scale, shift, eps))


def _is_of(result: Node, rows: Any, scale: Any, shift: Any, shape: Any) -> bool:
    """Whether types and shapes are those that the operation takes."""
    values = [value_of(node) for node in (result, rows, scale, shift)]
    whole = values[1]
    if whole is None or whole.dim() != 3:
        return False
    batch, _, channels = whole.shape
    if not isinstance(channels, int) or tuple(shape) != (channels,):
        return False
    allowed = ((batch, 1, channels), (1, 1, channels))
    return all(x is not None and x.dtype == whole.dtype for x in values) and all(
        x is not None and tuple(x.shape) in allowed for x in values[2:]
    )
