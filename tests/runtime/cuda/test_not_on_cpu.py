"""Proofs made on CPU do not depend on `xfuser_runtime.cuda`: nothing there is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

SCRIPT = """
import pkgutil, sys, importlib, xfuser_runtime
for module in pkgutil.walk_packages(xfuser_runtime.__path__, "xfuser_runtime."):
    if ".cuda" not in module.name and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
import torch
from torch import nn
from xfuser_runtime.config import EngineConfig
from xfuser_runtime.distributed.launch import prepare_environment
from xfuser_runtime.transformers.kernels import prepare_kernels
prepare_environment(EngineConfig())
model = nn.Module()
model.blocks = nn.ModuleList([nn.Linear(2, 2)])
prepare_kernels(model, ["blocks"])
print([name for name in sys.modules if name.startswith("xfuser_runtime.cuda.")])
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA is meant")
def test_nothing_is_imported_without_cuda() -> None:
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
