"""Rotary embeddings of heads, with their norms, as one kernel.

What upstream writes as a dozen operations on pairs of channels (`apply_rotary_emb` in
`diffusers.models.embeddings`) is found in the graph of a block, together with the norms of the
heads before it, also where the rows of two streams are joined in between. One kernel reads each
number once.

Shapes: B samples, S tokens, H heads, D channels of a head; heads are (B, S, H, D) or (B, H, S, D).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from xfuser_runtime.cuda.kernel import empty_joined, kernel
from xfuser_runtime.cuda.nodes import argument, is_call, item_of, replace_call, value_of


def rotate_at_once(graph: Graph) -> None:
    """Let one operation make each rotary embedding in `graph`, and its norms, in place."""
    target = torch.ops.xfuser_kernels.rotated_heads.default
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        found = _as_rotation(node)
        if found is None:
            continue
        parts, weights, eps = _norms_of(found)
        # Whoever reads a part, the heads or the angles first.
        read = [*parts, found.heads, found.cos, found.sin]
        readers = {user for x in read for user in x.users} & order.keys()
        first = min(readers, key=order.__getitem__)
        by = (found.cos, found.sin)
        replace_call(graph, first, node, target, parts, weights, eps, *by)


def token_dim(cos: torch.Tensor) -> int:
    """The dimension of the tokens, in heads that are turned by (1, S, 1, D) or (1, 1, S, D)."""
    return 1 if cos.shape[2] == 1 else 2


@kernel(
    "rotated_heads",
    fake=lambda parts, weights, eps, cos, sin: empty_joined(parts, token_dim(cos)),
)
def rotated_heads(
    parts: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> torch.Tensor:
    """The rotary embedding of the joined heads: (B, S, H, D) or (B, H, S, D).

    Args:
        parts: heads, to be joined by tokens.
        weights: (D,) of the RMS norm of each part; none for no norms.
        eps: of the norms.
        cos, sin: (1, S, 1, D) or (1, 1, S, D), fp32; neighbouring channels are pairs.
    """
    if parts[0].is_cuda:
        from xfuser_runtime.cuda.rotary_kernel import launch

        return launch(parts, weights, eps, cos, sin)
    if weights:
        size = weights[0].shape
        parts = [
            torch.rms_norm(x, size, w, eps) for x, w in zip(parts, weights, strict=True)
        ]
    heads = torch.cat(list(parts), dim=token_dim(cos))
    real, imaginary = heads.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (heads.float() * cos + turned.float() * sin).to(heads.dtype)


@dataclass(frozen=True)
class _Rotation:
    """A rotary embedding: what it turns, and by what."""

    heads: Node
    cos: Node
    sin: Node


def _as_rotation(node: Node) -> _Rotation | None:
    """`(heads.float() * cos + turned(heads).float() * sin).to(heads.dtype)`."""
    value = value_of(node)
    if value is None or value.dim() != 4 or not is_call(node, "to"):
        return None
    total = node.args[0]
    if not is_call(total, operator.add):
        return None
    products = total.args  # type: ignore[union-attr]
    if not all(is_call(product, operator.mul) for product in products):
        return None
    (plain, cos), (turned, sin) = (product.args for product in products)  # type: ignore[union-attr]
    if not (is_call(plain, "float") and is_call(turned, "float")):
        return None
    heads = plain.args[0]
    if _turned(turned.args[0]) is not heads or not _is_of(value, heads, cos, sin):
        return None
    return _Rotation(heads, cos, sin)


def _turned(node: Any) -> Node | None:
    """The heads whose neighbouring channels (a, b) a node has as (-b, a)."""
    if not is_call(node, "flatten"):
        return None
    stack = node.args[0]
    if not is_call(stack, torch.stack) or argument(stack, 1, "dim", 0) != -1:
        return None
    parts = argument(stack, 0, "tensors")
    if len(parts) != 2 or not is_call(parts[0], operator.neg):
        return None
    unbound = item_of(parts[0].args[0], 1)
    if unbound is None or item_of(parts[1], 0) is not unbound:
        return None
    if not is_call(unbound, "unbind") or argument(unbound, 1, "dim", 0) != -1:
        return None
    pairs = unbound.args[0]
    if not is_call(pairs, "reshape", "view", "unflatten"):
        return None
    heads: Node = pairs.args[0]  # type: ignore[union-attr,assignment]
    whole, paired, flat = (value_of(x) for x in (heads, pairs, node))
    if whole is None or paired is None or flat is None or flat.shape != whole.shape:
        return None
    expected = (*whole.shape[:-1], whole.shape[-1] // 2, 2)
    return heads if tuple(paired.shape) == expected else None


def _is_of(result: torch.Tensor, heads: Any, cos: Any, sin: Any) -> bool:
    """Whether types and shapes are those that the operation takes."""
    turned, by = value_of(heads), [value_of(x) for x in (cos, sin)]
    if turned is None or turned.shape != result.shape or turned.dtype != result.dtype:
        return False
    tokens, channels = turned.shape[1:3], turned.shape[3]
    shapes = ((1, tokens[0], 1, channels), (1, 1, tokens[1], channels))
    return isinstance(channels, int) and all(
        x is not None and x.dtype == torch.float32 and tuple(x.shape) in shapes
        for x in by
    )


def _norms_of(rotation: _Rotation) -> tuple[list[Node], list[Node], float]:
    """Parts, weights and epsilon of the norms before a rotation; none where others read them."""
    heads, cos = rotation.heads, value_of(rotation.cos)
    assert cos is not None
    whole: tuple[list[Node], list[Node], float] = ([heads], [], 0.0)
    parts = [heads]
    if is_call(heads, torch.cat) and argument(heads, 1, "dim", 0) == token_dim(cos):
        parts = list(argument(heads, 0, "tensors"))
    norms = [_norm_of(part) for part in parts]
    found = [norm for norm in norms if norm is not None]
    if len(found) != len(parts) or len({eps for _, _, eps in found}) > 1:
        return whole
    # What else reads the norms needs them made, and then they are made once.
    for node in {heads, *parts}:
        if len(node.users) > (2 if node is heads else 1):
            return whole
    return [x for x, _, _ in found], [w for _, w, _ in found], found[0][2]


def _norm_of(node: Any) -> tuple[Node, Node, float] | None:
    """Input, weight and epsilon of an RMS norm of heads."""
    if not is_call(node, torch.rms_norm):
        return None
    x, weight = node.args[0], argument(node, 2, "weight")
    shape, eps = argument(node, 1, "normalized_shape"), argument(node, 3, "eps")
    values = [value_of(each) for each in (node, x, weight)]
    if eps is None or any(each is None for each in values):
        return None
    same = len({each.dtype for each in values if each is not None}) == 1
    channels = values[0].shape[-1:]  # type: ignore[union-attr]
    return (x, weight, eps) if same and tuple(shape) == tuple(channels) else None
