"""Wrappers of denoising transformers."""

from __future__ import annotations

from xfuser_runtime.transformers.base_transformer import (
    xFuserModelBaseWrapper,
    xFuserTransformerBaseWrapper,
)
from xfuser_runtime.transformers.register import xFuserTransformerWrappersRegister

__all__ = [
    "xFuserModelBaseWrapper",
    "xFuserTransformerBaseWrapper",
    "xFuserTransformerWrappersRegister",
]
