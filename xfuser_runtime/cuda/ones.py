"""Divisions by one, which change nothing and cost a reading and a writing of all rows.

Attention of diffusers ends with them (`Attention.rescale_output_factor`).
"""

from __future__ import annotations

import operator

from torch.fx import Graph

from xfuser_runtime.cuda.nodes import is_written_between, put_in_place, value_of


def drop_divisions(graph: Graph) -> None:
    """Let those who read a quotient by one in `graph` read the dividend, in place."""
    for node in list(graph.nodes):
        if node.target is not operator.truediv or node.args[1] != 1:
            continue
        rows = node.args[0]
        before, after = value_of(rows), value_of(node)
        if before is None or after is None or before.dtype != after.dtype:
            continue
        # The quotient is a tensor of its own, which writing to the dividend leaves as it is.
        last = next(iter(reversed(graph.nodes)))
        if not is_written_between(graph, node, last):
            put_in_place(graph, rows, node)
