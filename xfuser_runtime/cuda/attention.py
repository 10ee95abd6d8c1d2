"""Attention calls of a block by the kernel that is fastest for their shape.

Code that calls torch's attention takes torch's choice of kernel. Where a package is installed that
may beat it, the call becomes an operator that makes the choice of `run_kernel`.

Shapes: B samples, H heads, S query rows, K key rows, D channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node
from torch.nn.attention import _sdpa_kernel

from xfuser_runtime.attention.backends import run_kernel, timed_backends
from xfuser_runtime.attention.kernels import KernelCall
from xfuser_runtime.cuda.choice import MIN_KEYS
from xfuser_runtime.cuda.kernel import kernel
from xfuser_runtime.cuda.nodes import argument, extent, is_call, replace_call, value_of
from xfuser_runtime.distributed.runtime_state import (
    get_runtime_state,
    runtime_state_is_initialized,
)


def choose_kernels(graph: Graph) -> None:
    """Let the kernel of each attention call in `graph` be chosen at its first call, in place.

    A kernel that the session or the block's code names stays.
    """
    nodes = list(graph.nodes)
    if not choices() or any(is_call(node, _sdpa_kernel) for node in nodes):
        return
    target = torch.ops.xfuser_kernels.attention.default
    for node in nodes:
        arguments = _attention_arguments(node)
        if arguments is not None:
            replace_call(graph, node, node, target, *arguments)


def choices() -> tuple[str, ...]:
    """The kernels that may take the place of torch's choice in this session."""
    if (
        runtime_state_is_initialized()
        and get_runtime_state().runtime_config.attention_backend is not None
    ):
        return ()
    return timed_backends()


@kernel(
    "attention",
    fake=lambda query, key, value, *_: _rows_first(
        query.new_empty(*query.shape[:-1], value.shape[-1])
    ),
)
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Scaled dot-product attention: (B, H, S, D).

    Args:
        query: (B, H, S, D).
        key, value: (B, H, K, D).
        is_causal: row i takes keys 0 to i.
        scale: factor of the scores, None for D ** -0.5.
    """
    rows = (x.transpose(1, 2) for x in (query, key, value))
    out, _ = run_kernel(KernelCall(*rows, is_causal=is_causal, scale=scale))
    return _rows_first(out.transpose(1, 2))


def _rows_first(heads: torch.Tensor) -> torch.Tensor:
    """The tensor (B, H, S, D) as it lies where all heads of a row are neighbours."""
    return heads.transpose(1, 2).contiguous().transpose(1, 2)


def _attention_arguments(node: Node) -> tuple[Any, ...] | None:
    """The arguments of `attention` for a call of torch's that it can make."""
    if not is_call(node, F.scaled_dot_product_attention):
        return None
    places = enumerate(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"))
    query, key, value, mask, dropout, is_causal = (
        argument(node, place, name) for place, name in places
    )
    if mask is not None or dropout or isinstance(is_causal, Node):
        return None
    values = [value_of(x) for x in (query, key, value)]
    if any(x is None or x.dim() != 4 for x in values):
        return None
    if len({(x.shape[:2], x.shape[3], x.dtype) for x in values if x is not None}) > 1:
        return None
    if extent(values[1].shape[2]) < MIN_KEYS:  # type: ignore[union-attr]
        return None
    scale = argument(node, 6, "scale")
    return query, key, value, bool(is_causal), scale
