"""The models that are measured: real sizes with random weights, and tiny ones for CPU.

No checkpoint and no text encoder is needed: weights are drawn from the name of each
parameter, so all processes hold the same ones whatever part of the model they keep, and
prompt embeddings are passed in.

Shapes: B = 1 sample, T text tokens.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class BenchmarkModel:
    """One pipeline at the size of its released checkpoint.

    Args:
        name: as given on the command line.
        pipeline: class of diffusers.
        transformer: class of diffusers.
        config: of the transformer; what is not named is the class's default.
        tiny: entries of the config that make it run on CPU in seconds.
        scheduler: class and options.
        embeddings: extents of each embedding after the batch; a string is a config entry.
        masks: embeddings' masks by keyword, with the number of tokens that count.
        arguments: further keyword arguments of the call.
        guided: the transformer sees both branches of guidance.
        components: components that the pipeline names beside transformer and scheduler.
        blocks: transformer blocks at real size, at tiny size.
    """

    name: str
    pipeline: str
    transformer: str
    config: Mapping[str, Any]
    tiny: Mapping[str, Any]
    scheduler: tuple[str, Mapping[str, Any]]
    embeddings: Mapping[str, tuple[int | str, ...]]
    components: tuple[str, ...]
    masks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    guided: bool = False
    blocks: tuple[int, int] = (0, 4)

    def num_blocks(self, *, tiny: bool) -> int:
        """Transformer blocks, the most stages that there can be."""
        return self.blocks[tiny]

    def transformer_config(self, *, tiny: bool) -> dict[str, Any]:
        """The whole config at real or tiny size."""
        return {**self.config, **(self.tiny if tiny else {})}


_FLUX = BenchmarkModel(
    name="flux",
    pipeline="FluxPipeline",
    transformer="FluxTransformer2DModel",
    config={"guidance_embeds": True, "joint_attention_dim": 4096},
    tiny={
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    },
    scheduler=(
        "FlowMatchEulerDiscreteScheduler",
        {"shift": 3.0, "use_dynamic_shifting": True},
    ),
    embeddings={
        "prompt_embeds": (512, "joint_attention_dim"),
        "pooled_prompt_embeds": ("pooled_projection_dim",),
    },
    components=("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    arguments={"guidance_scale": 3.5},
    blocks=(57, 4),
)

_SD3 = BenchmarkModel(
    name="sd3",
    pipeline="StableDiffusion3Pipeline",
    transformer="SD3Transformer2DModel",
    config={
        "num_layers": 24,
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "caption_projection_dim": 1536,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
    },
    tiny={
        "num_layers": 4,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "caption_projection_dim": 64,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
    },
    scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    embeddings={
        "prompt_embeds": (333, "joint_attention_dim"),
        "negative_prompt_embeds": (333, "joint_attention_dim"),
        "pooled_prompt_embeds": ("pooled_projection_dim",),
        "negative_pooled_prompt_embeds": ("pooled_projection_dim",),
    },
    components=(
        "vae",
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "text_encoder_3",
        "tokenizer_3",
    ),
    arguments={"guidance_scale": 7.0},
    blocks=(24, 4),
    guided=True,
)

_PIXART = BenchmarkModel(
    name="pixart",
    pipeline="PixArtAlphaPipeline",
    transformer="PixArtTransformer2DModel",
    config={"caption_channels": 4096, "sample_size": 128},
    tiny={
        "num_layers": 4,
        "num_attention_heads": 4,
        "attention_head_dim": 24,
        "cross_attention_dim": 96,
        "caption_channels": 32,
    },
    scheduler=("DPMSolverMultistepScheduler", {}),
    embeddings={
        "prompt_embeds": (120, "caption_channels"),
        "negative_prompt_embeds": (120, "caption_channels"),
    },
    masks={
        "prompt_attention_mask": (120, 40),
        "negative_prompt_attention_mask": (120, 8),
    },
    components=("vae", "text_encoder", "tokenizer"),
    arguments={
        "guidance_scale": 4.5,
        "use_resolution_binning": False,
        # Its default is "", which the pipeline refuses beside embeddings.
        "negative_prompt": None,
    },
    guided=True,
    blocks=(28, 4),
)

MODELS: dict[str, BenchmarkModel] = {m.name: m for m in (_FLUX, _SD3, _PIXART)}


def build_pipeline(
    model: BenchmarkModel, device: torch.device, *, tiny: bool, precise: bool = False
) -> Any:
    """The stock pipeline with random weights on `device`, bf16 on CUDA, fp32 on CPU.

    With `precise` it computes in fp32 from the same weights and noise.
    """
    diffusers = importlib.import_module("diffusers")
    dtype = _dtype(device)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            transformer = getattr(diffusers, model.transformer)(
                **model.transformer_config(tiny=tiny)
            )
    finally:
        torch.set_default_dtype(before)
    transformer = transformer.to(device=device, dtype=dtype).eval()
    draw_weights(transformer)
    name, options = model.scheduler
    scheduler = getattr(diffusers, name)(**options)
    pipeline = getattr(diffusers, model.pipeline)(
        transformer=transformer,
        scheduler=scheduler,
        **dict.fromkeys(model.components),
    )
    pipeline.set_progress_bar_config(disable=True)
    if precise:
        transformer.float()
        pipeline.prepare_latents = _in_fp32(pipeline.prepare_latents, dtype)
    return pipeline


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _in_fp32(prepare: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    """`prepare_latents` that draws noise in `dtype` and returns it in fp32."""

    def drawn(*args: Any, **kwargs: Any) -> Any:
        args = tuple(dtype if x is torch.float32 else x for x in args)
        found = prepare(*args, **kwargs)
        if isinstance(found, tuple):
            return tuple(x.float() for x in found)
        return found.float()

    return drawn


@torch.no_grad()
def draw_weights(module: nn.Module) -> None:
    """Fill all parameters from generators that are seeded with their names.

    Matrices are scaled by their fan-in, so that activations keep their size.
    """
    for name, parameter in module.named_parameters():
        generator = torch.Generator(parameter.device)
        generator.manual_seed(zlib.crc32(name.encode()))
        if parameter.dim() < 2:
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(center, 0.02, generator=generator)
        else:
            fan_in = parameter[0].numel()
            parameter.normal_(0.0, fan_in**-0.5, generator=generator)


def call_arguments(
    model: BenchmarkModel, pipeline: Any, *, size: int, steps: int, tiny: bool
) -> dict[str, Any]:
    """Keyword arguments of a pipeline call, the same in every process."""
    config = model.transformer_config(tiny=tiny)
    transformer = pipeline.transformer
    device, dtype = transformer.device, transformer.dtype
    generator = torch.Generator("cpu").manual_seed(0)
    defaults = {**dict(transformer.config), **config}
    arguments: dict[str, Any] = dict(model.arguments)
    for name, extents in model.embeddings.items():
        shape = [defaults[n] if isinstance(n, str) else n for n in extents]
        values = torch.randn(1, *shape, generator=generator)
        arguments[name] = values.to(device, _dtype(device)).to(dtype)
    for name, (length, kept) in model.masks.items():
        mask = torch.zeros(1, length, dtype=torch.long)
        mask[:, :kept] = 1
        arguments[name] = mask.to(device)
    arguments.update(
        height=size,
        width=size,
        num_inference_steps=steps,
        generator=torch.Generator("cpu").manual_seed(1),
        output_type="latent",
        return_dict=False,
    )
    return arguments
