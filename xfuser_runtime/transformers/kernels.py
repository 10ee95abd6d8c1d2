"""How the operations of a transformer call become kernels: compiled blocks, shared memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from xfuser_runtime.distributed.parallel_state import get_ulysses_group
from xfuser_runtime.distributed.runtime_state import (
    get_runtime_state,
    runtime_state_is_initialized,
)
from xfuser_runtime.transformers.stages import EmptyBlock

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
    if not state.runtime_config.use_torch_compile:
        return
    options: dict[str, Any] = {}
    if torch.cuda.is_available():
        from xfuser_runtime.cuda import passes, stacked

        vars(model)[_LAYOUT] = stacked.Layout(model)
        options = passes.OPTIONS
    for name in loops:
        for block in getattr(model, name):
            if not isinstance(block, EmptyBlock):
                block.compile(options=options)


def keep_layout(model: nn.Module) -> None:
    """Where the blocks are compiled for a GPU: put weights where their kernels want them.

    A model may have moved to another device or type since the last call.
    """
    layout = vars(model).get(_LAYOUT)
    if layout is not None:
        layout.keep(model)
