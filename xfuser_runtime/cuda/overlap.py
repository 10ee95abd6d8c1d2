"""Attention with its exchange beside the matrix products of a block that do not wait for it.

In a block whose attention and feed-forward layer read the same input, the exchange of Ulysses can
hide behind the feed-forward layer: neither waits for the other. What a compiled block computes is
a graph, where this shows whatever order the block's code has.

    before    product | exchange | attention | exchange | ...
    after     exchange | attention | exchange | end | ...
              product ...................... |
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Graph, Node

from xfuser_runtime.cuda.nodes import extent
from xfuser_runtime.cuda.products import GELU_PRODUCT

#: Matrix products, with the place of their rows among the arguments.
_PRODUCTS: dict[Any, int] = {
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.addmm.default: 1,
    GELU_PRODUCT: 0,
}
#: Operators whose calls all ranks make in one order.
_COLLECTIVES = ("xfuser_runtime", "_c10d_functional", "symm_mem")


def put_attention_beside(graph: Graph) -> None:
    """Put attention calls beside the products in `graph` that do not wait for them, in place."""
    # One product hides one call: what was moved once stays.
    placed: set[Node] = set()
    for call in list(graph.nodes):
        if call.target is torch.ops.xfuser_runtime.symmetric_ulysses.default:
            # Strides that the call asked for could make copies; it takes any.
            call.meta.pop("eager_input_vals", None)
            beside = independent_of(call, placed)
            products = [node for node in beside if is_as_large(node, call)]
            if products:
                _begin_and_end(call, beside, products)
                placed.update(beside)


def independent_of(call: Node, placed: set[Node]) -> list[Node]:
    """The computations that neither need `call` nor are needed by it, in their order.

    Those in `placed` are left out, and what collective calls need or make: their order stays.
    """
    nodes = list(call.graph.nodes)
    at = nodes.index(call)
    needed, waiting = {call, *placed}, {call}
    for node in reversed(nodes[:at]):
        if not _is_movable(node) or any(user in needed for user in node.users):
            needed.add(node)
    for node in nodes[at + 1 :]:
        if not _is_movable(node) or any(x in waiting for x in node.all_input_nodes):
            waiting.add(node)
    return [node for node in nodes if node not in needed and node not in waiting]


def is_as_large(node: Node, call: Node) -> bool:
    """Whether a node is a matrix product with as large an output as the attention call's."""
    return node.target in _PRODUCTS and math.prod(_shape(node)) >= math.prod(
        _shape(call)
    )


def _begin_and_end(call: Node, beside: list[Node], products: list[Node]) -> None:
    """Begin the call ahead of `beside`, end it after that."""
    graph, operators = call.graph, torch.ops.xfuser_runtime
    sizes = [size for node in products for size in _sizes(node)]
    with graph.inserting_before(call):
        begun = graph.call_function(
            operators.symmetric_ulysses_begin.default, (*call.args, sizes)
        )
        begun.meta.update(call.meta)
    for node in beside:
        call.prepend(node)
    with graph.inserting_before(call):
        graph.call_function(
            operators.symmetric_ulysses_end.default, (begun, *call.args[:3])
        )
    call.replace_all_uses_with(begun)
    graph.erase_node(call)


def _is_movable(node: Node) -> bool:
    namespace = getattr(node.target, "namespace", None)
    is_computation = node.op == "call_function" and not node.is_impure()
    return is_computation and namespace not in _COLLECTIVES


def _sizes(product: Node) -> tuple[int, int, int]:
    """Rows, inner extent and columns of a matrix product."""
    rows: Any = product.args[_PRODUCTS[product.target]]
    *before, columns = _shape(product)
    return math.prod(before), _shape(rows)[-1], columns


def _shape(node: Any) -> list[int]:
    """The extents of a node's value; of a symbolic one that of the call that was traced."""
    return [extent(size) for size in node.meta["val"].shape]
