"""Projections of the same rows as one matrix product.

Three products of a few thousand rows leave a part of the multiprocessors idle three times; one of
three times the columns does so once. The weights of a block's projections are laid one after the
other in memory, where the modules keep them as parts of it, and the products of a compiled block
that read the same rows become one operation. That looks at the addresses of the weights in each
call: where they do not lie so (an adapter took a layer's place, say) it makes them one by one.

Shapes: M rows, K channels, N channels of one projection.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from xfuser_runtime.cuda.kernel import kernel

#: diffusers' names of the projections that may read the same rows, in the order of their use.
_PROJECTIONS = (
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("to_k", "to_v"),
    ("add_k_proj", "add_v_proj"),
)
_ADDMM, _MM = torch.ops.aten.addmm.default, torch.ops.aten.mm.default
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)
_TRANSPOSED = (torch.ops.aten.permute.default, torch.ops.aten.t.default)


class Layout:
    """Keeps the projections of a model laid out on its GPU, wherever the model moves.

    Args:
        model: a transformer.
    """

    def __init__(self, model: nn.Module) -> None:
        first = next(_stackable(model), None)
        self._first = None if first is None else first[0].weight
        self._address = 0

    def keep(self, model: nn.Module) -> None:
        """Lay out what has moved since the last call; looks at one address otherwise."""
        first = self._first
        if first is not None and first.is_cuda and first.data_ptr() != self._address:
            lay_out(model)
            self._address = first.data_ptr()


def lay_out(model: nn.Module) -> None:
    """Lay the weights of projections that may be made together one after the other.

    The layers stay, their weights keep values and shapes. Nothing is copied a second time.
    """
    for layers in _stackable(model):
        _join([layer.weight for layer in layers])
        if layers[0].bias is not None:
            _join([layer.bias for layer in layers])


def stack_products(graph: Graph) -> None:
    """Make one operation of the products in `graph` that read the same rows, in place."""
    by_rows: dict[Any, list[_Projection]] = defaultdict(list)
    for found in map(_as_projection, graph.nodes):
        if found is not None:
            # Each layer has a view of its own of the same rows.
            key = (_base(found.rows), _shape(found.weight), found.bias is None)
            by_rows[key].append(found)
    for group in by_rows.values():
        if len(group) > 1:
            _replace(graph, group)


def _empty(
    rows: torch.Tensor, weights: Sequence[torch.Tensor], _: Sequence[torch.Tensor]
) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], sum(x.shape[0] for x in weights))


@kernel("stacked_product", fake=_empty)
def stacked_product(
    rows: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The products of rows (M, K) with each weight (N, K), side by side: (M, sum N).

    Args:
        rows: (M, K).
        weights: of one N.
        biases: (N,) each, or none at all.
    """
    weight, bias = _joined(weights), _joined(biases) if biases else None
    if weight is not None and (bias is not None or not biases):
        return nn.functional.linear(rows, weight, bias)
    out = rows.new_empty(len(rows), sum(len(x) for x in weights))
    parts = out.split([len(x) for x in weights], dim=1)
    for index, part in enumerate(parts):
        if biases:
            torch.addmm(biases[index], rows, weights[index].t(), out=part)
        else:
            torch.mm(rows, weights[index].t(), out=part)
    return out


class _Projection:
    """A node that is a product of rows with a transposed weight, and a bias."""

    def __init__(self, node: Node, rows: Node, weight: Node, bias: Node | None) -> None:
        self.node = node
        self.rows = rows
        self.weight = weight
        self.bias = bias


def _as_projection(node: Node) -> _Projection | None:
    if node.target is _ADDMM and not node.kwargs:
        bias, rows, matrix = node.args
    elif node.target is _MM:
        bias, (rows, matrix) = None, node.args
    else:
        return None
    if not (isinstance(matrix, Node) and matrix.target in _TRANSPOSED):
        return None
    weight = matrix.args[0]
    held = [weight] if bias is None else [weight, bias]
    if not all(isinstance(x, Node) and x.op == "placeholder" for x in held):
        return None
    assert isinstance(rows, Node) and isinstance(weight, Node)
    if len(_shape(weight)) != 2 or (isinstance(bias, Node) and len(_shape(bias)) != 1):
        return None
    return _Projection(node, rows, weight, bias if isinstance(bias, Node) else None)


def _base(node: Node) -> Node:
    """What a node is a view of with the same last extent."""
    while node.target in _VIEWS:
        whole = node.args[0]
        assert isinstance(whole, Node)
        if _shape(whole)[-1] != _shape(node)[-1]:
            break
        node = whole
    return node


def _replace(graph: Graph, group: Sequence[_Projection]) -> None:
    weights = [x.weight for x in group]
    biases = [x.bias for x in group if x.bias is not None]
    with graph.inserting_before(group[0].node):
        stacked = _new(
            graph,
            torch.ops.xfuser_kernels.stacked_product.default,
            group[0].rows,
            weights,
            biases,
        )
        start = 0
        for projection in group:
            stop = start + _shape(projection.weight)[0]
            part = _new(graph, torch.ops.aten.slice.Tensor, stacked, 1, start, stop)
            projection.node.replace_all_uses_with(part)
            start = stop
    for projection in group:
        graph.erase_node(projection.node)


def _new(graph: Graph, target: Any, *args: Any) -> Node:
    node = graph.call_function(target, args)
    values = torch.fx.node.map_arg(args, lambda x: x.meta["val"])
    node.meta["val"] = target(*values)
    return node


def _shape(node: Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _stackable(model: nn.Module) -> Iterator[list[nn.Linear]]:
    """The projections of each module that may read the same rows."""
    for module in model.modules():
        placed: set[str] = set()
        for names in _PROJECTIONS:
            layers: list[Any] = [getattr(module, name, None) for name in names]
            if placed.isdisjoint(names) and _can_be_stacked(layers):
                placed.update(names)
                yield layers


def _can_be_stacked(layers: Sequence[Any]) -> bool:
    """Plain linear layers of one shape and kind, not laid out yet."""
    if not all(type(layer) is nn.Linear for layer in layers):
        return False
    if len({layer.bias is None for layer in layers}) > 1:
        return False
    tensors = [x for layer in layers for x in layer.parameters(recurse=False)]
    kinds = {
        (layer.weight.shape, x.dtype, x.device) for layer in layers for x in tensors
    }
    plain = all(type(x.data) is torch.Tensor and not x.is_meta for x in tensors)
    weights = [layer.weight for layer in layers]
    return plain and len(kinds) == 1 and len(set(map(id, weights))) == len(weights)


def _join(parameters: Sequence[torch.Tensor]) -> None:
    """Make the parameters parts of one tensor, in their order."""
    if _joined(parameters) is not None:
        return
    whole = torch.cat([x.detach() for x in parameters])
    parts = whole.split([len(x) for x in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The tensor whose consecutive parts along the first dimension these are, if they are."""
    first = parts[0]
    address = first.data_ptr()
    for part in parts:
        is_next = part.data_ptr() == address and part.is_contiguous()
        if not is_next or part.shape[1:] != first.shape[1:]:
            return None
        address += part.numel() * part.itemsize
    length = sum(len(part) for part in parts)
    end = first.storage_offset() + length * first[0].numel()
    if first.untyped_storage().nbytes() < end * first.itemsize:
        return None
    return first.as_strided(
        (length, *first.shape[1:]), first.stride(), first.storage_offset()
    )
