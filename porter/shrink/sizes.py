"""Small configurations of diffusers' backbones and VAEs, from their ``__init__`` alone.

Sizes are chosen by the role of a parameter, and the role is read from its name and from
relations between upstream's defaults (a width that equals heads x head size keeps
doing so).  Everything that is not a size keeps upstream's default, so that every
mechanism that a released model switches on stays switched on.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

HEADS = 4
"""Attention heads: as many as the largest Ulysses degree that verify runs."""

HEAD_DIM = 24
"""Width of a head: multiples of 2, 3, 4 and 8 are what rotary axes (2 to 4 of them, each
even), size embeddings (thirds of the width) and GPU kernels ask for."""

TEXT_DIM = 32
"""Width of every text encoder, unlike any width of the backbone."""

MLP_DIM = 112
"""Hidden width of feed-forwards whose class asks for a number."""

BLOCKS = 4
"""Blocks of a backbone's first loop: two for each of two stages, one for each of four."""

LATER_BLOCKS = 2
"""Blocks of every further loop, so that the middle of all blocks is inside a loop."""

VAE_CHANNELS = 8
"""Channels of every VAE level."""

_REQUIRED = {"patch_size": 2, "in_channels": 4}
"""Parameters whose default None stands for a number that must be given."""

_HEADS = re.compile(r"^(text_)?(num_|n_)(cross_)?(attention_)?heads$")
_KV_HEADS = re.compile(r"^(text_)?(num_|n_)(key_value|kv)_(attention_)?heads$")
_HEAD_DIM = re.compile(r"^attention_head_dim$")
_AXES = re.compile(r"axes_dims?")
_LOOP = re.compile(r"^(num_|n_)?(\w*_)?(layers|depth|blocks)$")
_TEXT = re.compile(
    r"(^|_)(text|cap|caption|context|joint|llm|encoder|crossattn|cross|pooled)_.*(dim|channels|size)"
)
_MLP = re.compile(r"(ffn|ff|intermediate|moe).*(dim|size)|^approximator_hidden_dim$")
_WIDTH = re.compile(r"(^|_)(dim|size|width|channels)(_|$)")
_NOT_A_WIDTH = re.compile(r"sample_size|patch|max_size|pos_embed|vocab|codebook|theta")


def defaults(cls: type) -> dict[str, Any]:
    """``__init__`` parameters of ``cls`` with their defaults (None where required)."""
    parameters = list(inspect.signature(cls).parameters.values())
    return {
        p.name: None if p.default is p.empty else p.default
        for p in parameters
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }


def backbone_config(cls: type, blocks: int = BLOCKS) -> dict[str, Any]:
    """A small configuration of a denoising transformer: only what differs from default.

    ``blocks`` is the length of its first loop.

    Widths of the text and of the latents are a first guess here; the checkpoint module
    makes them agree with the other components.
    """
    given = defaults(cls)
    heads = next((v for k, v in given.items() if _HEADS.match(k) and v), None)
    head_dim = next((v for k, v in given.items() if _HEAD_DIM.match(k) and v), None)
    inner = _inner_width(given, heads, head_dim)
    config: dict[str, Any] = {}
    loops = 0
    for name, value in given.items():
        if _is_loop(name, value):
            small = blocks if loops == 0 else min(value, LATER_BLOCKS)
            loops += 1
        else:
            small = _small(name, value, heads, inner)
        if small is not None:
            config[name] = small
    for name, value in given.items():
        if _AXES.search(name):
            config[name] = _axes(value or (1, 1))
        elif name == "mrope_section":
            # Channels of each axis, interleaved: thirds of half a head.
            config[name] = (HEAD_DIM // 2 // 3,) * 3
    return {name: value for name, value in config.items() if value != given[name]}


def vae_config(cls: type, latent_channels: int | None) -> dict[str, Any]:
    """A small configuration of a VAE; ``latent_channels`` None keeps upstream's."""
    given = defaults(cls)
    config: dict[str, Any] = {}
    for name, value in given.items():
        if name == "norm_num_groups" or name == "attention_head_dim":
            config[name] = VAE_CHANNELS // 2
        elif name == "base_dim" or (name == "decoder_base_dim" and value):
            # Of the widest pictures; further levels have multiples of it.
            config[name] = VAE_CHANNELS // 2
        elif name.endswith("block_out_channels") and value:
            # One level by default, in released checkpoints four.
            width = VAE_CHANNELS
            if name != "block_out_channels":
                # Halves with widths of their own have shortcuts over groups of channels,
                # one or more for each channel of the latents.
                width = max(width, given.get("latent_channels") or 0)
            config[name] = (width,) * (len(value) if len(value) > 1 else 4)
        elif name.endswith("layers_per_block") and isinstance(value, Sequence):
            config[name] = (1,) * len(value)
        elif name.endswith("layers_per_block") or name == "num_res_blocks":
            config[name] = 1
        elif name == "shift_factor" and value is None:
            config[name] = 0.1
    if len(given.get("block_out_channels") or ()) == 1:
        for name in ("down_block_types", "up_block_types"):
            config[name] = tuple(given[name]) * 4
    if latent_channels is not None:
        config["latent_channels"] = latent_channels
    return config


def _inner_width(
    given: Mapping[str, Any], heads: int | None, head_dim: int | None
) -> int | None:
    """Upstream's default width of the residual stream."""
    if heads and head_dim:
        return heads * head_dim
    for name in ("hidden_size", "dim", "model_dim"):
        if given.get(name):
            return int(given[name])
    return None


def _is_loop(name: str, value: Any) -> bool:
    return isinstance(value, int) and value > 1 and bool(_LOOP.match(name))


def _small(name: str, value: Any, heads: int | None, inner: int | None) -> Any:
    """The small value of one parameter, None to keep the default."""
    if isinstance(value, bool) or not isinstance(value, int | None):
        return None
    if _HEADS.match(name):
        return HEADS
    if _KV_HEADS.match(name):
        # None means as many as query heads; groups keep being groups.
        grouped = value is not None and heads is not None and value < heads
        return HEADS // 2 if grouped else HEADS
    if _HEAD_DIM.match(name) or name == "cross_attention_head_dim":
        return HEAD_DIM
    if _TEXT.search(name) and "projection" not in name:
        return HEADS * HEAD_DIM if value == inner else TEXT_DIM
    if value is None:
        return _REQUIRED.get(name)
    if value == inner or name in ("hidden_size", "dim", "model_dim"):
        return HEADS * HEAD_DIM
    if _MLP.search(name):
        return MLP_DIM
    if value >= 512 and _WIDTH.search(name) and not _NOT_A_WIDTH.search(name):
        return TEXT_DIM
    return None


def _axes(upstream: Sequence[int]) -> Sequence[int]:
    """Even widths of the rotary axes, in upstream's proportion, that fill a head.

    Axes that are longer than any head count positions, not channels: they stay.
    """
    if min(upstream) > 128:
        return upstream
    axes = [HEAD_DIM * axis // sum(upstream) // 2 * 2 for axis in upstream]
    axes[0] += HEAD_DIM - sum(axes)
    return axes
