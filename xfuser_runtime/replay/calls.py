"""Keyword arguments of a call, rebuilt from what pickles; outputs, taken apart.

A value of `{"replay": "generator", "seed": n}` is a seeded CPU generator, one of
`{"replay": "callback", "module": m, "name": n, "arguments": {...}}` an object of class `n`
of module `m`, which may be the path of a file.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from xfuser_runtime.transformers.outputs import tensors_in


def unpacked(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Live keyword arguments; each call makes fresh generators and callbacks."""
    return {name: _unpacked(value) for name, value in kwargs.items()}


def callback_steps(kwargs: Mapping[str, Any]) -> list[int] | None:
    """The steps at which the call's callback was called, if it has one that counts."""
    for name in ("callback_on_step_end", "callback"):
        calls = getattr(kwargs.get(name), "calls", None)
        if calls is not None:
            return list(calls)
    return None


def output_tensors(output: Any) -> list[torch.Tensor]:
    """All tensors of a pipeline's output, in order."""
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return [tensor.detach().clone() for tensor in tensors_in(output)]


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict) and "replay" in value:
        if value["replay"] == "generator":
            return torch.Generator("cpu").manual_seed(value["seed"])
        made = getattr(_module(value["module"]), value["name"])
        return made(**value["arguments"])
    if isinstance(value, (list, tuple)):
        return type(value)(_unpacked(item) for item in value)
    return value


def _module(name: str) -> ModuleType:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
