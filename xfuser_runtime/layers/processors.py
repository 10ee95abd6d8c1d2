"""Attention processors that porter has not measured, where no tokens are split.

Such a processor computes attention by itself.  On whole tokens that is upstream's result; on
part of them it would be wrong.  Some mix the samples of a batch (perturbed attention has a
third of it) or remember one call for the next, so guidance is not split with them either.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from xfuser_runtime.distributed.parallel_state import (
    get_pipeline_parallel_world_size,
    get_sequence_parallel_world_size,
)
from xfuser_runtime.layers.base import xFuserLayerBaseWrapper
from xfuser_runtime.layers.register import xFuserAttentionProcessorRegister

_holders: weakref.WeakKeyDictionary[nn.Module, list[nn.Module]] = (
    weakref.WeakKeyDictionary()
)


def fit_processor(processor: Any) -> Any:
    """The ported form of a processor, or itself where every rank has all tokens and blocks.

    Raises:
        ValueError: tokens or blocks are split and its class is not ported (the manual's
            message).
    """
    register = xFuserAttentionProcessorRegister
    split = (get_sequence_parallel_world_size(), get_pipeline_parallel_world_size())
    known = register.is_ported(processor) or register.find(type(processor)) is not None
    if known:
        return register.convert(processor)
    if split == (1, 1):
        return processor
    raise ValueError(
        f"{register.kind} {type(processor).__name__} is not supported by xFuser where "
        "tokens or blocks are split; leave out the argument that sets it, or use data "
        "parallelism and CFG alone"
    )


def foreign_processor(model: nn.Module) -> Any:
    """A processor of a wrapped attention module of `model` that is not ported, or None."""
    if model not in _holders:
        _holders[model] = [
            module
            for module in model.modules()
            if isinstance(module, xFuserLayerBaseWrapper)
            and hasattr(module, "processor")
        ]
    for module in _holders[model]:
        processor = module.processor
        ported = xFuserAttentionProcessorRegister.is_ported(processor)
        if processor is not None and not ported:
            return processor
    return None
