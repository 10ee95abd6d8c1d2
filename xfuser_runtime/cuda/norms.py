"""Layer norms with the shift and scale of a condition, as one kernel.

The compiler reads a row twice, once for its moments; a kernel that holds a row in registers reads it
once. It takes the place of norms whose rows lie in memory already, and of norms of a residual sum:
what else computes rows is one kernel with the norm if the compiler makes it.

The compiler makes a residual sum anew wherever it is read, from what it is the sum of, so that it is
never rounded. Code that is not compiled rounds it, and so does the kernel that takes its place: a
stream of residuals that is rounded twice a block, not once, is as far from fp32 as that code's.

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
from xfuser_runtime.cuda.nodes import (
    argument,
    is_call,
    replace_call,
    replace_pair,
    value_of,
)
from xfuser_runtime.cuda.residuals import SUMS, GatedSum, as_sum


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


def add_and_modulate_at_once(graph: Graph, *, for_compiler: bool) -> None:
    """Let one operation make the modulated norm of each residual sum in `graph`, in place.

    Args:
        graph: of a block.
        for_compiler: the norm is of the exact sum where only further sums read it besides, which
            the compiler makes anew. Otherwise the operation makes the rounded sum, too.
    """
    kernels = torch.ops.xfuser_kernels
    for node in list(graph.nodes):
        norm = _as_modulated_norm(node)
        if norm is None or len(norm.arguments[0]) > 1:
            continue
        [rows], *modulation = norm.arguments
        total = as_sum(rows)
        terms = None if total is None else _terms_of(total)
        if total is None or terms is None or any(len(x.users) > 1 for x in norm.steps):
            continue
        arguments = (total.residual, *terms, *modulation)
        others = rows.users.keys() - set(norm.steps)
        if for_compiler and all(is_call(user, *SUMS) for user in others):
            exact = kernels.modulated_norm_of_exact_sum.default
            replace_call(graph, total.first, node, exact, *arguments)
        else:
            pair, rounded = (rows, node), kernels.modulated_norm_of_sum.default
            replace_pair(graph, total.first, pair, norm.steps, rounded, *arguments)


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


@kernel(
    "modulated_norm_of_sum",
    fake=lambda residual, *_: (
        empty_joined([residual], 1),
        empty_joined([residual], 1),
    ),
)
def modulated_norm_of_sum(
    residual: torch.Tensor,
    rows: torch.Tensor,
    gate: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`residual + gate * rows`, rounded once, and its `modulated_norm`: (B, S, C) each.

    Args:
        residual, rows: (B, S, C).
        gate: (B, 1, C) or (1, 1, C); None for one.
        scale, shift, eps: as for `modulated_norm`.
    """
    if residual.is_cuda:
        from xfuser_runtime.cuda.norm_kernel import launch_of_sum

        total = empty_joined([residual], 1)
        normed = launch_of_sum(residual, rows, gate, scale, shift, eps, total)
        return total, normed
    total = residual + rows if gate is None else torch.addcmul(residual, gate, rows)
    return total, modulated_norm([total], scale, shift, eps)


@kernel(
    "modulated_norm_of_exact_sum",
    fake=lambda residual, *_: empty_joined([residual], 1),
)
def modulated_norm_of_exact_sum(
    residual: torch.Tensor,
    rows: torch.Tensor,
    gate: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """`modulated_norm` of `residual + gate * rows`, which is not rounded before: (B, S, C).

    Args: as for `modulated_norm_of_sum`.
    """
    if residual.is_cuda:
        from xfuser_runtime.cuda.norm_kernel import launch_of_sum

        return launch_of_sum(residual, rows, gate, scale, shift, eps, None)
    wide = torch.promote_types(residual.dtype, torch.float32)
    terms = (None if x is None else x.to(wide) for x in (residual, rows, gate))
    _, normed = modulated_norm_of_sum(*terms, scale.to(wide), shift.to(wide), eps)
    return normed.to(residual.dtype)


@dataclass(frozen=True)
class _ModulatedNorm:
    """A norm with shift and scale.

    Args:
        first: the first node that reads its rows.
        steps: the norm, and the norm with its scale.
        arguments: of `modulated_norm`.
    """

    first: Node
    steps: tuple[Node, Node]
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
    return _ModulatedNorm(first, (norm, product), (parts, scale, shift, eps))


def _is_of(result: Node, rows: Any, scale: Any, shift: Any, shape: Any) -> bool:
    """Whether types and shapes are those that the operation takes."""
    values = [value_of(node) for node in (result, rows, scale, shift)]
    whole = values[1]
    if whole is None or whole.dim() != 3:
        return False
    channels = whole.shape[-1]
    if not isinstance(channels, int) or tuple(shape) != (channels,):
        return False
    return all(x is not None and x.dtype == whole.dtype for x in values) and all(
        x is not None and tuple(x.shape) in _condition_shapes(whole) for x in values[2:]
    )


def _terms_of(total: GatedSum) -> tuple[Node, Node | None] | None:
    """Rows and gate of a sum; None where the gate is another one for each token."""
    if len(total.factors) == 1:
        return total.factors[0], None
    whole = value_of(total.residual)
    assert whole is not None
    for rows, gate in (total.factors, total.factors[::-1]):
        values = [value_of(x) for x in (rows, gate)]
        shapes = [tuple(x.shape) for x in values if x is not None]
        if shapes[0] == tuple(whole.shape) and shapes[1] in _condition_shapes(whole):
            return rows, gate
    return None


def _condition_shapes(rows: torch.Tensor) -> tuple[tuple[int, int, int], ...]:
    """Of what is the same for all tokens of a sample."""
    batch, _, channels = rows.shape
    return (batch, 1, channels), (1, 1, channels)
