"""What becomes of the graph of a block before it becomes kernels, or is run as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, GraphModule

from xfuser_runtime.cuda import (
    attention,
    choice,
    kernel,
    nodes,
    norms,
    ones,
    overlap,
    products,
    residuals,
    rotary,
    stacked,
    symmetric,
)


class CodePass(CustomGraphPass):
    """Puts larger operations in place of those that the block's code calls."""

    def __call__(self, graph: Graph) -> None:
        """Rewrite the graph of a block in place."""
        if not torch.is_grad_enabled():
            # The operations are for inference.
            _put_larger_operations(graph, for_compiler=True)
            norms.modulate_at_once(graph)

    def uuid(self) -> Any:
        """Of this code, for the cache of compiled graphs."""
        return [
            _hash_of(attention, choice, kernel, nodes),
            _hash_of(norms, ones, products, residuals, rotary),
            attention.choices(),
        ]


class BlockPass(CustomGraphPass):
    """Stacks projections and puts attention beside the products that do not wait for it."""

    def __call__(self, graph: Graph) -> None:
        """Rewrite the graph of a block in place."""
        stacked.stack_products(graph)
        overlap.put_attention_beside(graph)

    def uuid(self) -> Any:
        """Of this code, for the cache of compiled graphs."""
        return _hash_of(nodes, overlap, stacked, symmetric)


def _hash_of(*modules: Any) -> Any:
    return get_hash_for_files((__file__, *(module.__file__ for module in modules)))


def rewrite(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend of `torch.compile` that compiles nothing: larger operations, the rest as it is."""
    if not torch.is_grad_enabled():
        graph = module.graph
        _put_larger_operations(graph, for_compiler=False)
        # What the compiler makes one kernel of without being told.
        norms.modulate_at_once(graph, with_computed_rows=True)
        # Sums in what is left over would be made anew, and then nobody knows that they are.
        nodes.drop_unread(graph)
        residuals.add_gated_at_once(graph)
        nodes.drop_unread(graph)
        module.recompile()
    return module.forward


def _put_larger_operations(graph: Graph, *, for_compiler: bool) -> None:
    ones.drop_divisions(graph)
    attention.choose_kernels(graph)
    norms.add_and_modulate_at_once(graph, for_compiler=for_compiler)
    products.take_in_gelu(graph)
    products.take_in_joining(graph)
    rotary.rotate_at_once(graph)


#: Options of `torch.compile` for blocks: one object, since code is shared by blocks that were
#: compiled with equal options.
OPTIONS: dict[str, Any] = {
    "pre_grad_custom_pass": CodePass(),
    "post_grad_custom_post_pass": BlockPass(),
    # It would undo the order that the pass makes.
    "reorder_for_peak_memory": False,
}
