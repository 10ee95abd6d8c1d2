"""Wrappers of diffusers pipelines."""

from __future__ import annotations

from xfuser_runtime.pipelines.base_pipeline import xFuserPipelineBaseWrapper
from xfuser_runtime.pipelines.register import xFuserPipelineWrapperRegister

__all__ = ["xFuserPipelineBaseWrapper", "xFuserPipelineWrapperRegister"]
