"""What becomes of the graph of a compiled block before it becomes kernels."""

from __future__ import annotations

from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

from xfuser_runtime.cuda import overlap, stacked, symmetric


class BlockPass(CustomGraphPass):
    """Stacks projections and puts attention beside the products that do not wait for it."""

    def __call__(self, graph: Graph) -> None:
        """Rewrite the graph of a block in place."""
        stacked.stack_products(graph)
        overlap.put_attention_beside(graph)

    def uuid(self) -> Any:
        """Of this code, for the cache of compiled graphs."""
        sources = (__file__, overlap.__file__, stacked.__file__, symmetric.__file__)
        return get_hash_for_files(sources)


#: Options of `torch.compile` for blocks: one object, since code is shared by blocks that were
#: compiled with equal options.
OPTIONS: dict[str, Any] = {
    "post_grad_custom_post_pass": BlockPass(),
    # It would undo the order that the pass makes.
    "reorder_for_peak_memory": False,
}
