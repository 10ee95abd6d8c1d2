"""Processors that pick the tokens which a mask marks, run as the runtime runs them.

The runtime keeps all tokens, gives the mask to the keys and zeroes what comes out for the
others (`xfuser_runtime.layers.present_tokens`); so do the probe's runs, on whole tokens and on a
rank's.

Shapes: query (B, H, K, D), the mask (T,) over the last of the K rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_PICKS = "nonzero"


def selects_tokens(module: nn.Module | None) -> bool:
    """Whether a module's processor asks for the indices of what a mask marks."""
    processor = type(getattr(module, "processor", None))
    call = inspect.getattr_static(processor, "__call__", None)
    code = getattr(call, "__code__", None)
    return code is not None and _PICKS in code.co_names


def present_tokens(
    block: nn.Module, running: Callable[[], nn.Module | None]
) -> AbstractContextManager[Any]:
    """`PresentTokens` where a module of the block picks tokens: it sees every call of torch."""
    if any(map(selects_tokens, block.modules())):
        return PresentTokens(running)
    return nullcontext()


class PresentTokens(TorchFunctionMode):  # type: ignore[misc]
    """Inside such a module all indices are given, and the mask goes with the next kernel.

    Args:
        running: the module that runs, None outside of any.
    """

    def __init__(self, running: Callable[[], nn.Module | None]) -> None:
        super().__init__()
        self._running = running
        self._mask: torch.Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nonzero and selects_tokens(self._running()):
            self._mask = args[0].flatten().bool()
            return torch.arange(len(self._mask)).unsqueeze(1)
        if func is F.scaled_dot_product_attention and self._mask is not None:
            mask, self._mask = self._mask, None
            before = mask.new_ones(args[1].shape[-2] - len(mask))
            kept = torch.cat([before, mask])
            out = func(*args, **{**kwargs, "attn_mask": kept[None, None, None]})
            return out.masked_fill(~kept.unsqueeze(1), 0)
        return func(*args, **kwargs)
