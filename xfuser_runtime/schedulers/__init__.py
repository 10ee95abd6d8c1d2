"""Schedulers that step one patch of the latents at a time (manual, section 3)."""

from __future__ import annotations

from xfuser_runtime.schedulers.base import (
    wrap_scheduler,
    xFuserSchedulerBaseWrapper,
)
from xfuser_runtime.schedulers.register import xFuserSchedulerWrappersRegister

__all__ = [
    "wrap_scheduler",
    "xFuserSchedulerBaseWrapper",
    "xFuserSchedulerWrappersRegister",
]
