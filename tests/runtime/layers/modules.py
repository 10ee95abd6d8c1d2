"""Small attention modules in the three forms that diffusers has, and ports of their processors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models import attention_dispatch
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from xfuser_runtime.layers import xFuserAttentionProcessorRegister

HEADS, HEAD_DIM = 3, 8
WIDTH = HEADS * HEAD_DIM


class HeadsFirstProcessor:
    """In the style of torch's function, (B, H, S, D)."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        query, key, value = (
            x.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for x in (
                attn.to_q(hidden_states),
                attn.to_k(hidden_states),
                attn.to_v(hidden_states),
            )
        )
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=0.0, is_causal=False
        )
        return attn.to_out[0](self.factor * out.transpose(1, 2).flatten(2))


@xFuserAttentionProcessorRegister.register(HeadsFirstProcessor)
class xFuserHeadsFirstProcessorWrapper(HeadsFirstProcessor):
    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        query, key, value = (
            x.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for x in (
                attn.to_q(hidden_states),
                attn.to_k(hidden_states),
                attn.to_v(hidden_states),
            )
        )
        out = attn.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=0.0, is_causal=False
        )
        return attn.to_out[0](self.factor * out.transpose(1, 2).flatten(2))


class OtherProcessor(HeadsFirstProcessor):
    """Nobody ported it."""


class WeightedProcessor(nn.Module):
    """A processor with weights, (B, S, H, D), two attention calls in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def __call__(self, attn: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return self._attend(
            attn, hidden_states, attention_dispatch.dispatch_attention_fn
        )

    def _attend(
        self, attn: Any, hidden_states: torch.Tensor, call: Any
    ) -> torch.Tensor:
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(2, (attn.heads, -1))

        query, key = heads(attn.to_q(hidden_states)), heads(attn.to_k(hidden_states))
        first = call(query, key, heads(attn.to_v(hidden_states)))
        second = call(key, query, heads(self.mix(hidden_states)))
        return attn.to_out[0]((first - second).flatten(2))


@xFuserAttentionProcessorRegister.register(WeightedProcessor)
class xFuserWeightedProcessorWrapper(WeightedProcessor):
    def __call__(self, attn: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return self._attend(attn, hidden_states, attn.dispatch_attention_fn)


class MixinAttention(nn.Module, AttentionModuleMixin):
    """diffusers' newer form of an attention module."""

    _default_processor_cls = WeightedProcessor
    _available_processors = [WeightedProcessor]

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.use_bias = HEADS, True
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])
        self.set_processor(WeightedProcessor())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.processor(self, hidden_states)


class OwnAttention(nn.Module):
    """Computes attention in its forward, without a processor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def attention(seed: int = 0) -> Attention:
    """diffusers' older form, with the heads-first processor."""
    torch.manual_seed(seed)
    return Attention(
        query_dim=WIDTH,
        heads=HEADS,
        dim_head=HEAD_DIM,
        processor=HeadsFirstProcessor(0.7),
    ).eval()


class TinyModel(ModelMixin, ConfigMixin, AttentionMixin):
    """Two attention modules in a model that diffusers can save and load."""

    @register_to_config
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.attn1 = Attention(width, heads=HEADS, dim_head=HEAD_DIM)
        self.attn2 = Attention(width, heads=HEADS, dim_head=HEAD_DIM)
        self.set_attn_processor(HeadsFirstProcessor())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.attn2(self.attn1(hidden_states))
