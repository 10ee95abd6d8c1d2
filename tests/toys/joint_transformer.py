"""Toy backbone (a): joint attention on packed latents, text first.

Rotary positions come from ids in ``forward``, the text's padding is a key mask of the
joint sequence, attention goes through ``dispatch_attention_fn``.
"""

# ruff: noqa: B007  (the loop header is the one that diffusers uses)
from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import (
    TimestepEmbedding,
    Timesteps,
    apply_rotary_emb,
    get_1d_rotary_pos_embed,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormContinuous, RMSNorm
from torch import nn


class ToyJointAttnProcessor:
    """Attention over the text and the image tokens, in this order."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: ToyJointAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        key = attn.to_k(hidden_states).unflatten(-1, (attn.heads, -1))
        value = attn.to_v(hidden_states).unflatten(-1, (attn.heads, -1))

        encoder_query = attn.add_q_proj(encoder_hidden_states).unflatten(
            -1, (attn.heads, -1)
        )
        encoder_key = attn.add_k_proj(encoder_hidden_states).unflatten(
            -1, (attn.heads, -1)
        )
        encoder_value = attn.add_v_proj(encoder_hidden_states).unflatten(
            -1, (attn.heads, -1)
        )

        query = attn.norm_q(query)
        key = attn.norm_k(key)

        query = torch.cat([encoder_query, query], dim=1)
        key = torch.cat([encoder_key, key], dim=1)
        value = torch.cat([encoder_value, value], dim=1)

        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)

        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        hidden_states = hidden_states.flatten(2, 3).to(query.dtype)

        encoder_hidden_states, hidden_states = hidden_states.split_with_sizes(
            [
                encoder_hidden_states.shape[1],
                hidden_states.shape[1] - encoder_hidden_states.shape[1],
            ],
            dim=1,
        )
        hidden_states = attn.to_out(hidden_states)
        encoder_hidden_states = attn.to_add_out(encoder_hidden_states)
        return hidden_states, encoder_hidden_states


class ToyJointAttention(nn.Module, AttentionModuleMixin):
    _default_processor_cls = ToyJointAttnProcessor
    _available_processors = [ToyJointAttnProcessor]

    def __init__(
        self, dim: int, heads: int, dim_head: int, processor: Any = None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.inner_dim = heads * dim_head
        self.to_q = nn.Linear(dim, self.inner_dim)
        self.to_k = nn.Linear(dim, self.inner_dim)
        self.to_v = nn.Linear(dim, self.inner_dim)
        self.add_q_proj = nn.Linear(dim, self.inner_dim)
        self.add_k_proj = nn.Linear(dim, self.inner_dim)
        self.add_v_proj = nn.Linear(dim, self.inner_dim)
        self.norm_q = RMSNorm(dim_head, eps=1e-6)
        self.norm_k = RMSNorm(dim_head, eps=1e-6)
        self.to_out = nn.Linear(self.inner_dim, dim)
        self.to_add_out = nn.Linear(self.inner_dim, dim)
        self.set_processor(
            processor if processor is not None else self._default_processor_cls()
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.processor(
            self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        )


class ToyJointTransformerBlock(nn.Module):
    def __init__(
        self, dim: int, num_attention_heads: int, attention_head_dim: int
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm1_context = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.modulation_context = nn.Linear(dim, 6 * dim)
        self.attn = ToyJointAttention(dim, num_attention_heads, attention_head_dim)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm2_context = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(dim, mult=2, activation_fn="gelu-approximate")
        self.ff_context = FeedForward(dim, mult=2, activation_fn="gelu-approximate")

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        temb = nn.functional.silu(temb)[:, None]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(
            temb
        ).chunk(6, dim=-1)
        c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = (
            self.modulation_context(temb).chunk(6, dim=-1)
        )

        attn_output, context_attn_output = self.attn(
            hidden_states=self.norm1(hidden_states) * (1 + scale) + shift,
            encoder_hidden_states=self.norm1_context(encoder_hidden_states)
            * (1 + c_scale)
            + c_shift,
            attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb,
        )
        hidden_states = hidden_states + gate * attn_output
        encoder_hidden_states = encoder_hidden_states + c_gate * context_attn_output

        norm_hidden_states = self.norm2(hidden_states) * (1 + scale_mlp) + shift_mlp
        hidden_states = hidden_states + gate_mlp * self.ff(norm_hidden_states)
        norm_context = (
            self.norm2_context(encoder_hidden_states) * (1 + c_scale_mlp) + c_shift_mlp
        )
        encoder_hidden_states = encoder_hidden_states + c_gate_mlp * self.ff_context(
            norm_context
        )
        return encoder_hidden_states, hidden_states


class ToyJointPosEmbed(nn.Module):
    def __init__(self, theta: float, axes_dim: tuple[int, ...]) -> None:
        super().__init__()
        self.theta = theta
        self.axes_dim = axes_dim

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos_out, sin_out = [], []
        for axis, dim in enumerate(self.axes_dim):
            cos, sin = get_1d_rotary_pos_embed(
                dim, ids[:, axis].float(), theta=self.theta, use_real=True
            )
            cos_out.append(cos)
            sin_out.append(sin)
        return torch.cat(cos_out, dim=-1), torch.cat(sin_out, dim=-1)


class ToyJointTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
    _supports_gradient_checkpointing = True
    _no_split_modules = ["ToyJointTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int | None = None,
        num_layers: int = 12,
        attention_head_dim: int = 64,
        num_attention_heads: int = 12,
        joint_attention_dim: int = 1024,
        axes_dims_rope: tuple[int, ...] = (16, 24, 24),
    ) -> None:
        super().__init__()
        self.inner_dim = num_attention_heads * attention_head_dim
        self.out_channels = out_channels or in_channels

        self.pos_embed = ToyJointPosEmbed(theta=10000, axes_dim=axes_dims_rope)
        self.time_proj = Timesteps(
            num_channels=64, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        self.time_embed = TimestepEmbedding(
            in_channels=64, time_embed_dim=self.inner_dim
        )
        self.context_embedder = nn.Linear(joint_attention_dim, self.inner_dim)
        self.x_embedder = nn.Linear(in_channels, self.inner_dim)
        self.transformer_blocks = nn.ModuleList(
            [
                ToyJointTransformerBlock(
                    self.inner_dim, num_attention_heads, attention_head_dim
                )
                for _ in range(num_layers)
            ]
        )
        self.norm_out = AdaLayerNormContinuous(
            self.inner_dim, self.inner_dim, elementwise_affine=False, eps=1e-6
        )
        self.proj_out = nn.Linear(self.inner_dim, self.out_channels)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: torch.Tensor,
        txt_ids: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> tuple[torch.Tensor] | Transformer2DModelOutput:
        """
        Args:
            hidden_states: packed latents, (batch, image tokens, channels).
            encoder_hidden_states: text, (batch, text tokens, joint_attention_dim).
            timestep: (batch,).
            img_ids, txt_ids: positions, (tokens, 3).
            encoder_attention_mask: (batch, text tokens), 0 for padding.
        """
        batch_size, image_seq_len, _ = hidden_states.shape
        hidden_states = self.x_embedder(hidden_states)

        temb = self.time_embed(
            self.time_proj(timestep * 1000).to(dtype=hidden_states.dtype)
        )
        encoder_hidden_states = self.context_embedder(encoder_hidden_states)

        # text tokens stand before image tokens
        ids = torch.cat((txt_ids, img_ids), dim=0)
        image_rotary_emb = self.pos_embed(ids)

        attention_mask = None
        if encoder_attention_mask is not None:
            image_mask = torch.ones(
                (batch_size, image_seq_len),
                dtype=torch.bool,
                device=hidden_states.device,
            )
            attention_mask = torch.cat(
                [encoder_attention_mask.bool(), image_mask], dim=1
            )
            attention_mask = attention_mask[:, None, None, :]

        for index_block, block in enumerate(self.transformer_blocks):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                encoder_hidden_states, hidden_states = (
                    self._gradient_checkpointing_func(
                        block,
                        hidden_states,
                        encoder_hidden_states,
                        temb,
                        attention_mask,
                        image_rotary_emb,
                    )
                )
            else:
                encoder_hidden_states, hidden_states = block(
                    hidden_states=hidden_states,
                    encoder_hidden_states=encoder_hidden_states,
                    temb=temb,
                    attention_mask=attention_mask,
                    image_rotary_emb=image_rotary_emb,
                )

        hidden_states = self.norm_out(hidden_states, temb)
        output = self.proj_out(hidden_states)

        if not return_dict:
            return (output,)

        return Transformer2DModelOutput(sample=output)
