"""What the nodes of a block's graph hold, as the block's code wrote it.

Before the compiler takes a block apart its graph names the functions that the code called. The
value of a node is a tensor without data, in its `meta`.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

#: Key in the `meta` of what a replaced call read.
_REPLACED = "xfuser_replaced"
_WRITING = frozenset(
    getattr(operator, name)
    for name in (
        *("iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul", "imod", "imul"),
        *("ior", "ipow", "irshift", "isub", "itruediv", "ixor", "setitem", "delitem"),
    )
)


def value_of(node: Any) -> torch.Tensor | None:
    """The tensor that a node stands for, None where it is not a plain one."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    if not isinstance(value, torch.Tensor) or is_traceable_wrapper_subclass(value):
        return None
    return value


def is_call(node: Any, *functions: Callable[..., Any] | str) -> bool:
    """Whether a node calls one of these functions, or methods by name."""
    return isinstance(node, Node) and node.target in functions


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, however it was given."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def item_of(node: Any, index: int) -> Node | None:
    """The sequence of tensors that a node takes the item at `index` from."""
    if is_call(node, operator.getitem) and node.args[1] == index:
        found: Node = node.args[0]
        return found
    return None


def linear_arguments(node: Any) -> tuple[Node, Node, Node | None] | None:
    """Rows, weight and bias of a linear function of plain tensors of one type."""
    if not is_call(node, F.linear):
        return None
    rows, weight = argument(node, 0, "input"), argument(node, 1, "weight")
    bias = argument(node, 2, "bias")
    values = [value_of(x) for x in (node, rows, weight, bias) if x is not None]
    # Under autocast the function computes in another type than an operator would.
    if (
        any(x is None for x in values)
        or len({x.dtype for x in values if x is not None}) > 1
    ):
        return None
    return rows, weight, bias


def extent(size: Any) -> int:
    """An extent; of a symbolic one that of the call that was traced."""
    hint: int = size if isinstance(size, int) else size.node.hint
    return hint


def replace_call(
    graph: Graph, first: Node, node: Node, target: Any, *args: Any
) -> None:
    """Let `target` compute what `node` did, unless something is written to in between.

    What `node` was made of stays, for `drop_unread` or the compiler.

    Args:
        graph: of the block.
        first: the first node that read what `target` reads at the place of `node`.
        node: to be replaced.
        target: an operator.
        *args: its arguments.
    """
    if is_written_between(graph, first, node):
        return
    with graph.inserting_before(node):
        new = graph.call_function(target, args)
    _put(graph, new, node)


def replace_pair(
    graph: Graph,
    first: Node,
    pair: tuple[Node, Node],
    between: Sequence[Node],
    target: Any,
    *args: Any,
) -> None:
    """Let the two results of `target` be what a pair of nodes was, as `replace_call` does.

    The operator stands at the place of the second node; where others read the first one before,
    nothing is done.

    Args:
        graph, first, target, args: as for `replace_call`.
        pair: to be replaced, in their order in the graph.
        between: what makes the second of the first, for nobody else; in their order.
    """
    earlier, last = pair
    order = {node: index for index, node in enumerate(graph.nodes)}
    readers = set(earlier.users) - set(between)
    if any(order[x] < order[last] for x in readers):
        return
    if is_written_between(graph, first, last):
        return
    with graph.inserting_before(last):
        made = graph.call_function(target, args)
        results = [
            graph.call_function(operator.getitem, (made, index)) for index in range(2)
        ]
    made.meta["example_value"] = tuple(node.meta["example_value"] for node in pair)
    _put(graph, results[1], last)
    for node in reversed(between):
        _mark_inputs(node)
        graph.erase_node(node)
    _put(graph, results[0], earlier)


def is_written_between(graph: Graph, first: Node, last: Node) -> bool:
    """Whether a node from `first` on and before `last` may write to a tensor."""
    nodes = list(graph.nodes)
    return any(map(_writes, nodes[nodes.index(first) : nodes.index(last)]))


def put_in_place(graph: Graph, new: Node, node: Node) -> None:
    """Let those who read `node` read `new`, which stands there already."""
    node.replace_all_uses_with(new)
    _mark_inputs(node)
    graph.erase_node(node)


def _put(graph: Graph, new: Node, node: Node) -> None:
    """Let a new node be what `node` was."""
    new.meta["example_value"] = node.meta["example_value"]
    put_in_place(graph, new, node)


def drop_unread(graph: Graph) -> None:
    """Erase what only replaced calls read, up to what others read or what writes.

    Other calls that nobody reads stay: they may draw random numbers, say.
    """
    for node in reversed(graph.nodes):
        is_unread = node.meta.get(_REPLACED) and not node.users
        is_operation = node.op in ("call_function", "call_method")
        if is_unread and is_operation and not _writes(node):
            _mark_inputs(node)
            graph.erase_node(node)


def _mark_inputs(node: Node) -> None:
    for held in node.all_input_nodes:
        held.meta[_REPLACED] = True


def _writes(node: Node) -> bool:
    """Whether a node may write to a tensor, by how torch names what does."""
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace"):
        return True
    if node.op not in ("call_method", "call_function"):
        # What is called otherwise is not looked into.
        return node.op not in ("placeholder", "get_attr", "output")
    name = getattr(node.target, "__name__", str(node.target))
    is_dunder = name.startswith("__") and name.endswith("__")
    if node.target in _WRITING or (name.endswith("_") and not is_dunder):
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    return _is_in_place(node)


def _is_in_place(node: Node) -> bool:
    """Whether a call's argument `inplace`, given by its place, says so."""
    try:
        signature = inspect.signature(node.target)  # type: ignore[arg-type]
        given = signature.bind(*node.args, **node.kwargs).arguments
    except (TypeError, ValueError):
        return False
    return bool(given.get("inplace"))
