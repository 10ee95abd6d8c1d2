"""Ulysses between GPUs that can write to each other's memory: no message, no extra copy.

The operators that a compiled block calls, and which way heads travel: `exchange.py` makes a call.

Shapes: B batch, S_r rows of rank r, H heads, D head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from xfuser_runtime.cuda.exchange import Exchange
from xfuser_runtime.cuda.peer_memory import Beside
from xfuser_runtime.cuda.ways import WAYS, Mover, Way, different, fastest
from xfuser_runtime.distributed.parallel_state import get_ulysses_group
from xfuser_runtime.distributed.runtime_state import get_runtime_state

#: How heads travel; None to time the ways on CUDA.
WAY: Way | None = None


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Attention of the local queries over the keys of all ranks of the Ulysses group.

    Args:
        query: (B, S_local, H, D), H a multiple of the degree.
        key, value: (B, K_local, H, D).
        query_lengths, key_lengths: rows of each rank.
        is_causal: row i takes keys 0 to i.
        scale: factor of the scores, None for D ** -0.5.

    Returns:
        (B, S_local, H, D).
    """
    return torch.ops.xfuser_runtime.symmetric_ulysses(
        query, key, value, list(query_lengths), list(key_lengths), is_causal, scale
    )


@torch.library.custom_op("xfuser_runtime::symmetric_ulysses", mutates_args=())
def _symmetric_ulysses(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_lengths: list[int],
    key_lengths: list[int],
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    sources = (query, key, value)
    call = Exchange.of(sources, query_lengths, key_lengths, is_causal, scale)
    return call.run(_chosen_way(call, call.run))


@torch.library.custom_op("xfuser_runtime::symmetric_ulysses_begin", mutates_args=())
def _begin(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_lengths: list[int],
    key_lengths: list[int],
    is_causal: bool,
    scale: float | None,
    products: list[int],
) -> torch.Tensor:
    """`symmetric_ulysses` beside the kernels that follow; `symmetric_ulysses_end` waits for it.

    Until then the output is not filled and the inputs must stay as they are. `products` are the
    rows, inner extent and columns of each matrix product that follows.
    """
    sources = (query, key, value)
    call = Exchange.of(sources, query_lengths, key_lengths, is_causal, scale)
    run = functools.partial(_beside_products, call, products)
    way = _chosen_way(call, run, products)
    get_runtime_state().workspaces["begun"] = _addresses(sources)
    return _begun(call, way)


@_symmetric_ulysses.register_fake
@_begin.register_fake
def _(query: torch.Tensor, *rest: Any) -> torch.Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op(
    "xfuser_runtime::symmetric_ulysses_end", mutates_args=("result",)
)
def _end(
    result: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    """Wait for what `symmetric_ulysses_begin` began; query, key and value are its inputs."""
    begun = get_runtime_state().workspaces.pop("begun")
    if begun != _addresses((query, key, value)):
        raise RuntimeError(
            "attention beside other work read copies of its inputs, expected the inputs; "
            "run without use_torch_compile"
        )
    _finish(result)


def _begun(call: Exchange, way: Way) -> torch.Tensor:
    """The output of a call that runs beside the kernels that follow."""
    query = call.sources[0]
    result = torch.empty_like(query, memory_format=torch.contiguous_format)
    beside, staged = Beside(query.device, "attention"), None
    beside.follow()
    if way.mover is not Mover.KERNELS:
        # The kernels that follow would keep the multiprocessors from those that stage; what
        # is staged travels without any.
        with beside.running():
            staged = call.stage(way)
        beside.wait_for(beside.mark())
    with beside.running():
        call.run(way, result, staged)
    return result


def _finish(result: torch.Tensor) -> None:
    beside = Beside(result.device, "attention")
    beside.wait_for(beside.mark())


def _beside_products(call: Exchange, products: Sequence[int], way: Way) -> torch.Tensor:
    """The call beside matrix products of these sizes, to time a way."""
    result, like = _begun(call, way), call.sources[0]
    for rows, inner, columns in zip(*(iter(products),) * 3, strict=True):
        torch.mm(like.new_ones(rows, inner), like.new_ones(inner, columns))
    _finish(result)
    return result


def _addresses(tensors: Iterable[torch.Tensor]) -> tuple[int, ...]:
    return tuple(x.data_ptr() for x in tensors)


def _chosen_way(
    call: Exchange, run: Callable[[Way], torch.Tensor], beside: Sequence[int] = ()
) -> Way:
    """The way that this session takes for calls of a shape; the first call times them all.

    What it depends on is the same on all ranks, so that all choose, and choose alike.

    Args:
        call: its shape.
        run: makes the call by a way.
        beside: the sizes of what runs beside it.
    """
    query = call.sources[0]
    if WAY is not None or not query.is_cuda:
        return WAY or Way()
    held, group = get_runtime_state().workspaces, get_ulysses_group()
    batch, _, heads, channels = query.shape
    rows = (sum(call.query_lengths), sum(call.key_lengths))
    shape = (batch, *rows, heads, channels)
    key = ("way", *shape, query.dtype, call.is_causal, tuple(beside))
    if key not in held:
        if torch.cuda.is_current_stream_capturing():
            return Way()
        ways = different(WAYS, heads // group.world_size)
        held[key] = fastest(run, ways, group)
    way: Way = held[key]
    return way
