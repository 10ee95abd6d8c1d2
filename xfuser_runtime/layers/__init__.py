"""Layers on part of the tokens or rows, and their registers (manual, section 4)."""

from __future__ import annotations

from xfuser_runtime.layers.attention import (
    reset_kv_caches,
    wrap_attention,
    xFuserAttentionBaseWrapper,
)
from xfuser_runtime.layers.base import wrap_layer, xFuserLayerBaseWrapper
from xfuser_runtime.layers.conv import xFuserConv2dWrapper
from xfuser_runtime.layers.embeddings import xFuserPatchEmbedWrapper
from xfuser_runtime.layers.gathered import (
    GatheredModule,
    TokenCut,
    wrap_gathered,
)
from xfuser_runtime.layers.processors import whole_batch_processor
from xfuser_runtime.layers.register import (
    xFuserAttentionProcessorRegister,
    xFuserLayerWrappersRegister,
)
from xfuser_runtime.layers.rows import RowBands, row_bands, wrap_row_layer

__all__ = [
    "GatheredModule",
    "RowBands",
    "TokenCut",
    "reset_kv_caches",
    "row_bands",
    "whole_batch_processor",
    "wrap_attention",
    "wrap_gathered",
    "wrap_layer",
    "wrap_row_layer",
    "xFuserAttentionBaseWrapper",
    "xFuserAttentionProcessorRegister",
    "xFuserConv2dWrapper",
    "xFuserLayerBaseWrapper",
    "xFuserLayerWrappersRegister",
    "xFuserPatchEmbedWrapper",
]
