"""What the process server imports before it forks: all that a measurement needs."""

from __future__ import annotations

import diffusers
import torch

from benchmarks import worker
from benchmarks.models import MODELS

# diffusers imports its classes when they are first asked for.
for _model in MODELS.values():
    getattr(diffusers, _model.pipeline)
    getattr(diffusers, _model.transformer)
    getattr(diffusers, _model.scheduler[0])

assert not torch.cuda.is_initialized(), "CUDA was started before the fork"

__all__ = ["worker"]
