"""Loading of adapters into a transformer that is split into pipeline stages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from xfuser_runtime.transformers.stages import EmptyBlock


def takes_own_weights(load: Callable[..., Any]) -> Callable[..., Any]:
    """Upstream's `load_lora_adapter`, given only the weights of this stage's blocks.

    The others would be reported as unexpected on every stage, and a stage without any
    would be refused.
    """

    @functools.wraps(load)
    def load_lora_adapter(
        self: Any, weights: Any, prefix: str | None = "transformer", **kwargs: Any
    ) -> Any:
        foreign = _foreign_blocks(self)
        if not foreign or not isinstance(weights, Mapping):
            return load(self, weights, prefix=prefix, **kwargs)
        own = {
            key: value
            for key, value in weights.items()
            if not key.removeprefix(f"{prefix}.").startswith(foreign)
        }
        if own or not weights:
            return load(self, own, prefix=prefix, **kwargs)
        return _register(self, kwargs.get("adapter_name"))

    return load_lora_adapter


def _foreign_blocks(model: nn.Module) -> tuple[str, ...]:
    return tuple(
        f"{path}."
        for path, module in model.named_modules()
        if isinstance(module, EmptyBlock)
    )


def _register(model: Any, adapter_name: str | None) -> None:
    """Let the model know an adapter of which it holds no layer."""
    # Both are optional packages of diffusers.
    from diffusers.utils.peft_utils import get_adapter_name
    from peft import LoraConfig

    held = vars(model).setdefault("peft_config", {})
    held[adapter_name or get_adapter_name(model)] = LoraConfig()
    model._hf_peft_config_loaded = True
