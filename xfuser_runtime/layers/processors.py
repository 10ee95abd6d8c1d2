"""Attention processors that look at the whole batch, or may do so.

A processor that is not ported computes attention by itself.  On whole tokens that is upstream's
result; on part of them it would be wrong.  Some mix the samples of a batch (perturbed attention
has a third of it) or remember one call for the next, so guidance is not split with them, nor
with ported ones that a pipeline sets for such a batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any

from torch import nn

from xfuser_runtime.distributed.parallel_state import (
    get_pipeline_parallel_world_size,
    get_sequence_parallel_world_size,
)
from xfuser_runtime.errors import InputError
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


def whole_batch_processor(model: nn.Module, of_batch: Collection[str] = ()) -> Any:
    """A processor of a wrapped attention module that may look at the whole batch, or None.

    Args:
        model: the wrapped transformer.
        of_batch: qualified names of the ported classes that do; one that is not ported may.
    """
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
        if processor is not None and not (ported and _is_none_of(processor, of_batch)):
            return processor
    return None


def refuse_stages(model: nn.Module, of_batch: Collection[str]) -> None:
    """Refuse ported processors of the whole batch where blocks are split into stages.

    Porter has not measured that.

    Raises:
        InputError: one is set in a model of several stages.
    """
    if not of_batch or get_pipeline_parallel_world_size() == 1:
        return
    found = whole_batch_processor(model, of_batch)
    if found is not None:
        raise InputError(
            f"{xFuserAttentionProcessorRegister.kind} {type(found).__name__} in a model of "
            "several stages, expected those of other calls; leave out the argument that "
            "sets it"
        )


def _is_none_of(processor: Any, names: Collection[str]) -> bool:
    return not names or not any(
        f"{base.__module__}.{base.__qualname__}" in names
        for base in type(processor).__mro__
    )
