"""Matrix products that take in what stands beside them.

    before    product | bias, GELU         joined = first, second | product of joined
    after     product, bias, GELU          product of first | product of second, added to it

A GELU behind a product reads and writes as much as the product does, while the product's own kernel
has each number in registers already. Rows that are joined to be multiplied once are read and written
for nothing: their product is the sum of two.

Shapes: ... rows, K channels, N channels of a product.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from xfuser_runtime.cuda.kernel import kernel
from xfuser_runtime.cuda.nodes import (
    argument,
    extent,
    is_call,
    linear_arguments,
    replace_call,
    value_of,
)

#: Fewer rows are joined faster than a second product starts.
MIN_ROWS = 256
#: Fewer columns are decisions (a router's), which should not hang on one rounding more.
MIN_COLUMNS = 256
#: Channels of each part: others make products of weights that lie at odd addresses.
MULTIPLE = 8


def take_in_gelu(graph: Graph) -> None:
    """Let the products in `graph` that a GELU in its tanh form follows compute it, in place."""
    for node in list(graph.nodes):
        if not is_call(node, F.gelu):
            continue
        product = argument(node, 0, "input")
        arguments = linear_arguments(product)
        is_tanh = argument(node, 1, "approximate", "none") == "tanh"
        has_bias = arguments is not None and arguments[2] is not None
        if is_tanh and arguments is not None and has_bias and len(product.users) == 1:
            replace_call(graph, product, node, GELU_PRODUCT, *arguments)


def take_in_joining(graph: Graph) -> None:
    """Let the products in `graph` of two tensors joined by channels take both, in place."""
    target = torch.ops.xfuser_kernels.joined_product.default
    for node in list(graph.nodes):
        arguments = linear_arguments(node)
        parts = None if arguments is None else _joined_channels(arguments[0])
        product = value_of(node)
        if arguments is None or parts is None or product is None:
            continue
        if product.shape[-1] >= MIN_COLUMNS:
            joined, *held = arguments
            replace_call(graph, joined, node, target, *parts, *held)


def _empty(rows: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    """An empty product of rows, by channels all or a part of them, with a weight."""
    return rows.new_empty(*rows.shape[:-1], weight.shape[0])


@kernel("gelu_product", fake=_empty)
def gelu_product(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """The GELU, in its tanh form, of the product of rows (..., K) with a weight: (..., N).

    Args:
        rows: (..., K).
        weight: (N, K).
        bias: (N,).
    """
    flat = rows.reshape(-1, rows.shape[-1])
    if rows.is_cuda:
        out = torch._addmm_activation(bias, flat, weight.t(), use_gelu=True)
    else:
        # There that operator's GELU is the exact one.
        out = F.gelu(F.linear(flat, weight, bias), approximate="tanh")
    return out.view(*rows.shape[:-1], len(weight))


@kernel(
    "joined_product",
    fake=lambda first, second, weight, bias: _empty(first, weight, bias),
)
def joined_product(
    first: torch.Tensor,
    second: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The product of two tensors joined by channels with a weight: (..., N).

    Args:
        first, second: (..., K1) and (..., K2).
        weight: (N, K1 + K2).
        bias: (N,).
    """
    left, right = (x.reshape(-1, x.shape[-1]) for x in (first, second))
    of_left, of_right = weight.t().split([left.shape[1], right.shape[1]])
    out = left @ of_left if bias is None else torch.addmm(bias, left, of_left)
    return out.addmm_(right, of_right).view(*first.shape[:-1], len(weight))


#: As it stands in the graph of a block.
GELU_PRODUCT = torch.ops.xfuser_kernels.gelu_product.default


def _joined_channels(node: Node) -> list[Node] | None:
    """The two tensors that a node joins by channels, for its one user alone."""
    joined = value_of(node)
    if joined is None or not is_call(node, torch.cat) or len(node.users) > 1:
        return None
    parts, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    values = [value_of(part) for part in parts]
    if len(parts) != 2 or dim not in (-1, joined.dim() - 1):
        return None
    for value in values:
        if value is None or value.dtype != joined.dtype:
            return None
        if not isinstance(value.shape[-1], int) or value.shape[-1] % MULTIPLE:
            return None
    rows = math.prod(map(extent, joined.shape[:-1]))
    return list(parts) if rows >= MIN_ROWS else None
