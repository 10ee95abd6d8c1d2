"""A diffusion transformer that no rule was written for.

The test copies this file under a random module name and renames its classes. Annotations
are evaluated, as in diffusers: `from_pretrained` reads the classes in them.
"""

# ruff: noqa: B006, B007
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from transformers import T5EncoderModel, T5Tokenizer


def rotate(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """Turn pairs of channels of (B, H, S, D) by angles (S, D / 2)."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = freqs.cos(), freqs.sin()
    return torch.stack(
        [first * cos - second * sin, first * sin + second * cos], -1
    ).flatten(-2)


class WeftProcessor:
    def __call__(
        self,
        attn: Any,
        warp: torch.Tensor,
        words: torch.Tensor | None = None,
        freqs: torch.Tensor | None = None,
    ) -> Any:
        batch, rows, _ = warp.shape
        q, k, v = attn.qkv(warp).view(batch, rows, 3, attn.heads, -1).unbind(2)
        if freqs is not None and words is not None:
            q = rotate(q.transpose(1, 2), freqs).transpose(1, 2)
            k = rotate(k.transpose(1, 2), freqs).transpose(1, 2)
        if words is not None:
            wq, wk, wv = (
                attn.words_qkv(words)
                .view(batch, words.shape[1], 3, attn.heads, -1)
                .unbind(2)
            )
            q, k, v = (torch.cat(pair, 1) for pair in ((q, wq), (k, wk), (v, wv)))
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )
        out = out.transpose(1, 2).flatten(2)
        if words is None:
            return attn.out(out)
        return attn.out(out[:, :rows]), attn.words_out(out[:, rows:])


class WeftAttention(nn.Module, AttentionModuleMixin):
    _default_processor_cls = WeftProcessor
    _available_processors = [WeftProcessor]

    def __init__(self, dim: int, heads: int, joint: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        if joint:
            self.words_qkv, self.words_out = (
                nn.Linear(dim, 3 * dim),
                nn.Linear(dim, dim),
            )
        self.set_processor(WeftProcessor())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.processor(self, *args, **kwargs)


class WeftPairBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn = WeftAttention(dim, heads, joint=True)
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(4)])
        self.shift = nn.Linear(dim, 4 * dim)
        self.ff, self.words_ff = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(
        self,
        warp: torch.Tensor,
        words: torch.Tensor,
        moment: torch.Tensor,
        freqs: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        a, b, c, d = self.shift(F.silu(moment))[:, None].chunk(4, -1)
        seen, read = self.attn(
            self.norms[0](warp) + a, self.norms[1](words) + b, freqs=freqs
        )
        warp, words = warp + seen, words + read
        warp = warp + F.gelu(self.ff(self.norms[2](warp) + c))
        words = words + F.gelu(self.words_ff(self.norms[3](words) + d))
        return warp, words


class WeftBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn = WeftAttention(dim, heads, joint=False)
        self.norm, self.gate = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.ff = nn.Linear(dim, dim)

    def forward(self, cloth: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
        gate = self.gate(F.silu(moment))[:, None].tanh()
        cloth = cloth + gate * self.attn(self.norm(cloth))
        return cloth + F.gelu(self.ff(cloth))


class WeftTransformerModel(ModelMixin, ConfigMixin):
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 6,
        num_single_layers: int = 4,
        num_attention_heads: int = 4,
        attention_head_dim: int = 24,
        text_dim: int = 32,
    ) -> None:
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.patch = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.words_in = nn.Linear(text_dim, dim)
        self.moment_in = nn.Linear(2, dim)
        self.pairs = nn.ModuleList(
            [WeftPairBlock(dim, num_attention_heads) for _ in range(num_layers)]
        )
        self.weave = nn.ModuleList(
            [WeftBlock(dim, num_attention_heads) for _ in range(num_single_layers)]
        )
        self.norm_out = nn.LayerNorm(dim)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * in_channels)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        return_dict: bool = True,
    ) -> Any:
        size = self.config.patch_size
        batch, channels, height, width = hidden_states.shape
        rows, columns = height // size, width // size
        angle = timestep.to(hidden_states.dtype)[:, None] / 1000
        moment = self.moment_in(torch.cat([angle.sin(), angle.cos()], -1))
        warp = self.patch(hidden_states).flatten(2).transpose(1, 2)
        words = self.words_in(encoder_hidden_states)

        half = self.config.attention_head_dim // 4
        step = 100.0 ** (-torch.arange(half, device=warp.device) / half)
        down = torch.arange(rows, device=warp.device)[:, None].expand(rows, columns)
        right = torch.arange(columns, device=warp.device).expand(rows, columns)
        freqs = torch.cat([down.reshape(-1, 1) * step, right.reshape(-1, 1) * step], -1)

        for pair in self.pairs:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                warp, words = self._gradient_checkpointing_func(
                    pair, warp, words, moment, freqs
                )
            else:
                warp, words = pair(warp, words, moment, freqs)

        cloth = torch.cat([warp, words], dim=1)
        for block in self.weave:
            cloth = block(cloth, moment)
        warp = cloth[:, : warp.shape[1]]

        out = self.proj_out(self.norm_out(warp))
        out = out.reshape(batch, rows, columns, size, size, channels)
        out = out.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)
        if not return_dict:
            return (out,)
        return Transformer2DModelOutput(sample=out)


class WeftPipeline(DiffusionPipeline):
    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        tokenizer: T5Tokenizer,
        text_encoder: T5EncoderModel,
        vae: AutoencoderKL,
        transformer: WeftTransformerModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
        )
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def encode_prompt(
        self, prompt: str | list[str], device: torch.device
    ) -> torch.Tensor:
        prompt = [prompt] if isinstance(prompt, str) else prompt
        inputs = self.tokenizer(
            prompt, padding="longest", return_tensors="pt", truncation=True
        ).to(device)
        return self.text_encoder(
            inputs.input_ids, attention_mask=inputs.attention_mask
        )[0]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        height: int = 64,
        width: int = 64,
        num_inference_steps: int = 20,
        guidance_scale: float = 3.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw `prompt`; a `guidance_scale` above 1 asks the model twice a step."""
        batch_size = 1 if isinstance(prompt, str) else len(prompt)
        device = self._execution_device
        prompt_embeds = self.encode_prompt(prompt, device)
        if guidance_scale > 1:
            negative_embeds = self.encode_prompt(
                negative_prompt or [""] * batch_size, device
            )
        shape = (
            batch_size,
            self.transformer.config.in_channels,
            height // self.vae_scale_factor,
            width // self.vae_scale_factor,
        )
        if latents is None:
            latents = randn_tensor(
                shape, generator=generator, device=device, dtype=prompt_embeds.dtype
            )
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                timestep = t.expand(latents.shape[0])
                noise_pred = self.transformer(
                    hidden_states=latents,
                    encoder_hidden_states=prompt_embeds,
                    timestep=timestep,
                    return_dict=False,
                )[0]
                if guidance_scale > 1:
                    noise_uncond = self.transformer(
                        hidden_states=latents,
                        encoder_hidden_states=negative_embeds,
                        timestep=timestep,
                        return_dict=False,
                    )[0]
                    noise_pred = noise_uncond + guidance_scale * (
                        noise_pred - noise_uncond
                    )
                latents = self.scheduler.step(
                    noise_pred, t, latents, return_dict=False
                )[0]
                progress_bar.update()

        if output_type == "latent":
            image = latents
        else:
            image = self.vae.decode(
                latents / self.vae.config.scaling_factor, return_dict=False
            )[0]
            image = self.image_processor.postprocess(image, output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (image,)
        return ImagePipelineOutput(images=image)
