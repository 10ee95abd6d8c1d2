"""Toy backbone (b): latents of four dimensions, two block loops, image first.

Joint blocks with two streams, then blocks on the concatenated sequence.  Rotary
positions are computed in ``forward`` from the latents' grid, rows of the text that are
all zero are padding, attention is ``F.scaled_dot_product_attention``.
"""

# ruff: noqa: B007  (the loop header is the one that diffusers uses)
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.embeddings import (
    TimestepEmbedding,
    Timesteps,
    apply_rotary_emb,
    get_1d_rotary_pos_embed,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormContinuous
from torch import nn


class ToyBatchedAttnProcessor:
    """Attention over the image and, where it is a stream of its own, the text tokens."""

    def __call__(
        self,
        attn: ToyBatchedAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        batch_size, image_len, _ = hidden_states.shape

        query = attn.to_q(hidden_states)
        key = attn.to_k(hidden_states)
        value = attn.to_v(hidden_states)

        if encoder_hidden_states is not None:
            query = torch.cat([query, attn.add_q_proj(encoder_hidden_states)], dim=1)
            key = torch.cat([key, attn.add_k_proj(encoder_hidden_states)], dim=1)
            value = torch.cat([value, attn.add_v_proj(encoder_hidden_states)], dim=1)

        head_dim = query.shape[-1] // attn.heads
        query = query.view(batch_size, -1, attn.heads, head_dim).transpose(1, 2)
        key = key.view(batch_size, -1, attn.heads, head_dim).transpose(1, 2)
        value = value.view(batch_size, -1, attn.heads, head_dim).transpose(1, 2)

        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb)
            key = apply_rotary_emb(key, image_rotary_emb)

        hidden_states = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=0.0, is_causal=False
        )
        hidden_states = hidden_states.transpose(1, 2).reshape(
            batch_size, -1, attn.heads * head_dim
        )

        if encoder_hidden_states is None:
            return attn.to_out(hidden_states)

        hidden_states, encoder_hidden_states = (
            hidden_states[:, :image_len],
            hidden_states[:, image_len:],
        )
        return attn.to_out(hidden_states), attn.to_add_out(encoder_hidden_states)


class ToyBatchedAttention(nn.Module, AttentionModuleMixin):
    _default_processor_cls = ToyBatchedAttnProcessor
    _available_processors = [ToyBatchedAttnProcessor]

    def __init__(
        self, dim: int, heads: int, two_streams: bool, processor: Any = None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.Linear(dim, dim)
        if two_streams:
            self.add_q_proj = nn.Linear(dim, dim)
            self.add_k_proj = nn.Linear(dim, dim)
            self.add_v_proj = nn.Linear(dim, dim)
            self.to_add_out = nn.Linear(dim, dim)
        self.set_processor(
            processor if processor is not None else self._default_processor_cls()
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return self.processor(self, hidden_states, encoder_hidden_states, **kwargs)


class ToyBatchedTransformerBlock(nn.Module):
    def __init__(self, dim: int, num_attention_heads: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(dim, 6 * dim)
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm1_context = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ToyBatchedAttention(dim, num_attention_heads, two_streams=True)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm2_context = nn.LayerNorm(dim, eps=1e-6)
        self.ff = FeedForward(dim, mult=2, activation_fn="gelu-approximate")
        self.ff_context = FeedForward(dim, mult=2, activation_fn="gelu-approximate")

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        modulation = self.modulation(F.silu(temb))[:, None]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)

        attn_output, context_attn_output = self.attn(
            self.norm1(hidden_states) * (1 + scale) + shift,
            self.norm1_context(encoder_hidden_states),
            attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb,
        )
        hidden_states = hidden_states + gate * attn_output
        hidden_states = hidden_states + gate_mlp * self.ff(
            self.norm2(hidden_states) * (1 + scale_mlp) + shift_mlp
        )

        encoder_hidden_states = encoder_hidden_states + context_attn_output
        encoder_hidden_states = encoder_hidden_states + self.ff_context(
            self.norm2_context(encoder_hidden_states)
        )
        return encoder_hidden_states, hidden_states


class ToyBatchedSingleTransformerBlock(nn.Module):
    def __init__(self, dim: int, num_attention_heads: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(dim, 3 * dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = ToyBatchedAttention(dim, num_attention_heads, two_streams=False)
        self.ff = FeedForward(dim, mult=2, activation_fn="gelu-approximate")

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        shift, scale, gate = self.modulation(F.silu(temb))[:, None].chunk(3, dim=-1)
        norm_hidden_states = self.norm(hidden_states) * (1 + scale) + shift
        attn_output = self.attn(
            norm_hidden_states,
            attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb,
        )
        return hidden_states + gate * (attn_output + self.ff(norm_hidden_states))


class ToyBatchedTransformer2DModel(ModelMixin, ConfigMixin):
    _supports_gradient_checkpointing = True
    _no_split_modules = [
        "ToyBatchedTransformerBlock",
        "ToyBatchedSingleTransformerBlock",
    ]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 12,
        num_single_layers: int = 12,
        attention_head_dim: int = 64,
        num_attention_heads: int = 12,
        joint_attention_dim: int = 1024,
        axes_dims_rope: tuple[int, ...] = (32, 32),
    ) -> None:
        super().__init__()
        self.inner_dim = num_attention_heads * attention_head_dim
        patch_dim = in_channels * patch_size * patch_size

        self.time_proj = Timesteps(
            num_channels=64, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        self.time_embed = TimestepEmbedding(
            in_channels=64, time_embed_dim=self.inner_dim
        )
        self.context_embedder = nn.Linear(joint_attention_dim, self.inner_dim)
        self.proj_in = nn.Linear(patch_dim, self.inner_dim)
        self.transformer_blocks = nn.ModuleList(
            [
                ToyBatchedTransformerBlock(self.inner_dim, num_attention_heads)
                for _ in range(num_layers)
            ]
        )
        self.single_transformer_blocks = nn.ModuleList(
            [
                ToyBatchedSingleTransformerBlock(self.inner_dim, num_attention_heads)
                for _ in range(num_single_layers)
            ]
        )
        self.norm_out = AdaLayerNormContinuous(
            self.inner_dim, self.inner_dim, elementwise_affine=False, eps=1e-6
        )
        self.proj_out = nn.Linear(self.inner_dim, patch_dim)
        self.gradient_checkpointing = False

    def _rotary_emb(
        self, height: int, width: int, text_len: int, device: torch.device
    ) -> tuple[torch.Tensor, ...]:
        rows = torch.arange(height, device=device).repeat_interleave(width)
        columns = torch.arange(width, device=device).repeat(height)
        # the text continues the diagonal of the image
        text = torch.arange(text_len, device=device) + max(height, width)
        ids = torch.stack(
            [torch.cat([rows, text]), torch.cat([columns, text])], dim=-1
        ).float()
        embeds = [
            get_1d_rotary_pos_embed(dim, ids[:, axis], use_real=True)
            for axis, dim in enumerate(self.config.axes_dims_rope)
        ]
        return torch.cat([cos for cos, _ in embeds], dim=-1), torch.cat(
            [sin for _, sin in embeds], dim=-1
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        return_dict: bool = True,
    ) -> tuple[torch.Tensor] | Transformer2DModelOutput:
        """
        Args:
            hidden_states: latents, (batch, channels, height, width).
            encoder_hidden_states: text, (batch, text tokens, joint_attention_dim).
            timestep: (batch,).
        """
        batch_size, channels, height, width = hidden_states.shape
        p = self.config.patch_size
        post_patch_height, post_patch_width = height // p, width // p

        # 1. patches and conditions
        hidden_states = hidden_states.reshape(
            batch_size, channels, post_patch_height, p, post_patch_width, p
        )
        hidden_states = (
            hidden_states.permute(0, 2, 4, 1, 3, 5).flatten(3, 5).flatten(1, 2)
        )
        hidden_states = self.proj_in(hidden_states)
        image_len, text_len = hidden_states.shape[1], encoder_hidden_states.shape[1]

        text_mask = encoder_hidden_states.abs().sum(dim=-1) > 0
        image_mask = text_mask.new_ones((batch_size, image_len))
        attention_mask = torch.cat([image_mask, text_mask], dim=1)[:, None, None, :]

        temb = self.time_embed(self.time_proj(timestep).to(hidden_states.dtype))
        encoder_hidden_states = self.context_embedder(encoder_hidden_states)
        image_rotary_emb = self._rotary_emb(
            post_patch_height, post_patch_width, text_len, hidden_states.device
        )

        # 2. blocks with two streams
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
                    hidden_states,
                    encoder_hidden_states,
                    temb,
                    attention_mask,
                    image_rotary_emb,
                )

        # 3. blocks with one
        hidden_states = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        for index_block, block in enumerate(self.single_transformer_blocks):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(
                    block, hidden_states, temb, attention_mask, image_rotary_emb
                )
            else:
                hidden_states = block(
                    hidden_states,
                    temb=temb,
                    attention_mask=attention_mask,
                    image_rotary_emb=image_rotary_emb,
                )
        hidden_states = hidden_states[:, :image_len]

        # 4. latents again
        hidden_states = self.proj_out(self.norm_out(hidden_states, temb))
        hidden_states = hidden_states.reshape(
            batch_size, post_patch_height, post_patch_width, channels, p, p
        )
        output = hidden_states.permute(0, 3, 1, 4, 2, 5).reshape(
            batch_size, channels, height, width
        )

        if not return_dict:
            return (output,)

        return Transformer2DModelOutput(sample=output)
