"""Watching and replacing what a stock pipeline calls, for reference runs.

Every attention of diffusers that is softmax over keys ends in torch's
`scaled_dot_product_attention`, called by the processor or by `dispatch_attention_fn`'s
native backend.  A `TorchFunctionMode` sees the call whichever name it was imported under,
so nothing in the model is touched.

Shapes: query (B, H, Sq, D), key and value (B, H, Sk, D).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from porter.source import is_transformer


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one `scaled_dot_product_attention` call, by its names."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def run(self) -> torch.Tensor:
        """What stock computes for these arguments, (B, H, Sq, D)."""
        with torch._C.DisableTorchFunction():
            return F.scaled_dot_product_attention(
                self.query,
                self.key,
                self.value,
                attn_mask=self.attn_mask,
                dropout_p=self.dropout_p,
                is_causal=self.is_causal,
                scale=self.scale,
                enable_gqa=self.enable_gqa,
            )

    def select_keys(self, rows: torch.Tensor) -> AttentionCall:
        """The call over the key rows `rows` (integers) alone, mask columns alike."""
        mask = self.attn_mask
        if mask is not None and mask.shape[-1] > 1:
            mask = mask.index_select(-1, rows)
        return replace(
            self,
            key=self.key.index_select(-2, rows),
            value=self.value.index_select(-2, rows),
            attn_mask=mask,
        )


Replacement = Callable[[AttentionCall], torch.Tensor]


class _AttentionMode(TorchFunctionMode):  # type: ignore[misc]
    def __init__(self, replacement: Replacement) -> None:
        super().__init__()
        self._replacement = replacement

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._replacement(AttentionCall(*args, **kwargs))
        return func(*args, **kwargs)


@contextlib.contextmanager
def replaced_attention(replacement: Replacement) -> Iterator[None]:
    """Every attention call inside the block goes to `replacement`."""
    with _AttentionMode(replacement):
        yield


@contextlib.contextmanager
def denoiser_attention(pipeline: Any, replacement: Replacement) -> Iterator[None]:
    """As `replaced_attention`, only while a denoiser of `pipeline` runs: text encoders and
    the VAE keep theirs, and what encodes conditions before the first transformer call.

    Raises:
        ValueError: the pipeline holds no denoiser.
    """
    depth, begun = 0, False
    models = denoisers(pipeline)
    transformers = [model for name, model in models.items() if is_transformer(name)]

    def enter(module: nn.Module, *_: Any) -> None:
        nonlocal depth, begun
        depth += 1
        begun |= not transformers or any(module is found for found in transformers)

    def leave(*_: Any) -> None:
        nonlocal depth
        depth -= 1

    def choose(call: AttentionCall) -> torch.Tensor:
        return replacement(call) if depth and begun else call.run()

    handles = []
    for module in models.values():
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with replaced_attention(choose):
            yield
    finally:
        for handle in handles:
            handle.remove()


def denoisers(pipeline: Any) -> dict[str, nn.Module]:
    """The components that the denoising loop may call: diffusers models that decode nothing.

    Raises:
        ValueError: there is none.
    """
    from diffusers import ModelMixin

    found = {
        name: module
        for name, module in pipeline.components.items()
        if isinstance(module, ModelMixin) and not hasattr(module, "decode")
    }
    if not found:
        raise ValueError(
            f"{type(pipeline).__name__} holds no denoising model, expected a diffusers "
            "model among its components; it cannot be verified"
        )
    return found


@contextlib.contextmanager
def kept_processors(pipeline: Any) -> Iterator[None]:
    """After the block the transformers have the attention processors that they had before.

    A pipeline that sets others for a call leaves them there when the call fails.
    """
    models = [
        (model, dict(model.attn_processors))
        for name, model in denoisers(pipeline).items()
        if is_transformer(name) and hasattr(model, "set_attn_processor")
    ]
    try:
        yield
    finally:
        for model, held in models:
            model.set_attn_processor(held)


def install_step(scheduler: Any, replacement: Callable[..., Any]) -> None:
    """Let `scheduler.step` call `replacement(original, args, kwargs)`, signature kept."""
    original = type(scheduler).step.__get__(scheduler)

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, args, kwargs)

    scheduler.step = step


@contextlib.contextmanager
def replaced_step(scheduler: Any, replacement: Callable[..., Any]) -> Iterator[None]:
    """As `install_step`, for the time of the block."""
    install_step(scheduler, replacement)
    try:
        yield
    finally:
        del scheduler.step


@contextlib.contextmanager
def replaced_global(namespace: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """A global of a module, set for the time of the block."""
    missing = object()
    before = namespace.get(name, missing)
    namespace[name] = value
    try:
        yield
    finally:
        if before is missing:
            del namespace[name]
        else:
            namespace[name] = before
