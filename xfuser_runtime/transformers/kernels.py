"""How the operations of a transformer call become kernels.

Blocks are compiled or get larger operations, calls are captured, heads go through shared memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from xfuser_runtime.distributed.parallel_state import get_ulysses_group
from xfuser_runtime.distributed.runtime_state import (
    get_runtime_state,
    runtime_state_is_initialized,
)
from xfuser_runtime.transformers.outputs import tensors_in
from xfuser_runtime.transformers.stages import EmptyBlock
from xfuser_runtime.transformers.wrapping import Wrapping

_LAYOUT = "_xfuser_layout"


def prepare_kernels(model: nn.Module, loops: Iterable[str]) -> None:
    """What speeds up the calls of a wrapped transformer; a collective call.

    Where the session asks for it the blocks of this rank are compiled in place; the blocks
    of a list share one compiled code, and the code around them stays as it is.

    Args:
        model: a wrapped transformer.
        loops: attribute names of its block lists.
    """
    if not runtime_state_is_initialized():
        return
    state = get_runtime_state()
    if torch.cuda.is_available() and not state.has_symmetric_memory:
        from xfuser_runtime.cuda.peer_memory import is_usable

        state.has_symmetric_memory = is_usable(get_ulysses_group())
    options = _compilation(model)
    if options is None:
        return
    for name in loops:
        for block in getattr(model, name):
            if not isinstance(block, EmptyBlock):
                block.compile(**options)


def _compilation(model: nn.Module) -> dict[str, Any] | None:
    """The arguments of `torch.compile` that the session asks for; None where it does not."""
    config = get_runtime_state().runtime_config
    has_gpu = torch.cuda.is_available()
    if config.use_torch_compile and has_gpu:
        from xfuser_runtime.cuda import passes, stacked

        vars(model)[_LAYOUT] = stacked.Layout(model)
        return {"options": passes.OPTIONS}
    if config.use_torch_compile:
        return {}
    if config.use_fused_kernels and has_gpu:
        from xfuser_runtime.cuda import passes

        return {"backend": passes.rewrite}
    return None


def run_call(
    forward: Callable[..., Any],
    model: nn.Module,
    wrapping: Wrapping,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """`forward(model, *args, **kwargs)`; on a GPU from a graph, where there is one.

    Args:
        forward: of the model's class.
        model: a wrapped transformer.
        wrapping: what it keeps beside its weights.
        args, kwargs: of the call.
    """
    if not any(x.is_cuda for x in tensors_in((args, kwargs))):
        return forward(model, *args, **kwargs)
    if wrapping.replayer is None:
        from xfuser_runtime.cuda.graphs import CallReplayer

        wrapping.replayer = CallReplayer(
            channel=wrapping.channel() if wrapping.plan.num_stages > 1 else None,
            streams=wrapping.buffers,
        )
    _keep_layout(model)
    return wrapping.replayer.call(forward, model, args, kwargs)


def _keep_layout(model: nn.Module) -> None:
    """Where the blocks are compiled for a GPU: put weights where their kernels want them.

    A model may have moved to another device or type since the last call.
    """
    layout = vars(model).get(_LAYOUT)
    if layout is not None:
        layout.keep(model)
