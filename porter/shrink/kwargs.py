"""Keyword arguments for a small call of any pipeline, read from ``__call__``."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from . import table, table_moving
from .media import (
    FRAME_NAMES,
    FRAME_TOKEN_ROWS,
    conditions,
    frame_count,
    is_of_frames,
    seconds,
    sound,
    takes_one,
    videos,
)
from .pictures import mask, picture, pictures
from .sources import source_of

TOKEN_ROWS = ((8, 8), (6, 14), (7, 9))
"""Token rows and columns of the picture sizes: even, wide, odd."""

PROMPTS = (
    (
        'a small cactus with a happy face and a sign "hi"',
        "a red fox in deep snow, under a pale winter sun at dawn",
        "two boats",
    ),
    (
        "an astronaut on a horse on the moon, stars and craters around, highly detailed, "
        '"the moon at dawn"',
        "a quiet lake",
        "a photo of two wooden boats on a quiet lake, mist between the mountains",
    ),
)
"""Two sets of prompts whose lengths differ, so that padding masks differ by row; quoted
words are what glyph encoders read.  The first ones differ by more than eight tokens: some
pipelines pad to a multiple of that."""

NEGATIVE_PROMPT = "blurry, watermark"
GUIDANCE = 4.0
SEQUENCE_LENGTHS = (48, 72)
"""`max_sequence_length` for the short and the long set."""

_SPATIAL_NAMES = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio")
_PROMPT_NAMES = ("prompt", "negative_prompt")
_SOUND_NAMES = ("audio_end_in_s", "audio_duration", "audio_duration_s", "duration")
_GUIDANCE_NAMES = ("true_cfg_scale", "guidance_scale")
_SOUND_GUIDANCE = "audio_guidance_scale"
"""Of the sound beside a video; either scale switches the second branch of both."""


def image_sizes(pipeline: Any) -> tuple[tuple[int, int], ...]:
    """Three small legal (height, width) in pixels, of different numbers of tokens; token rows
    as in TOKEN_ROWS."""
    fixed = getattr(pipeline, "resolutions", None)
    if fixed:
        # Pipelines that know a list of (width, height) take no other.
        by_area = {width * height: (height, width) for width, height in fixed}
        return tuple(size for _, size in sorted(by_area.items())[:3])
    names = inspect.signature(type(pipeline).__call__).parameters
    # Sound has a length alone, which is made from the same numbers.
    cell = 1 if set(_SOUND_NAMES) & set(names) else _cell(pipeline)
    tokens = FRAME_TOKEN_ROWS if is_of_frames(names) else TOKEN_ROWS
    tokens = table.TOKEN_ROWS.get(type(pipeline).__name__, tokens)
    return tuple((rows * cell, columns * cell) for rows, columns in tokens)


def takes_one_prompt(pipeline: Any) -> bool:
    """Whether calls of ``pipeline`` have one prompt, whatever batch is asked for."""
    return type(pipeline).__name__ in table.ONE_PROMPT | table_moving.ONE_PROMPT


def call_kwargs(
    pipeline: Any,
    *,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 1,
    guidance: bool = True,
    text: int = 0,
    num_inference_steps: int = 8,
    seed: int = 0,
    output_type: str = "latent",
) -> dict[str, Any]:
    """Arguments for one stock call of ``pipeline``.

    Args:
        height, width: pixels; None takes the first of :func:`image_sizes`.
        batch_size: prompts in the call; one where the pipeline takes no more.
        guidance: whether the second branch is on.
        text: 0 or 1, one of two sets of prompts of different token counts.
        num_inference_steps: denoising steps.
        seed: of the fresh CPU generator.
        output_type: as the pipeline takes it.

    Returns:
        Only names that ``__call__`` takes.
    """
    names = inspect.signature(type(pipeline).__call__).parameters
    sizes = image_sizes(pipeline)
    first = sizes[0]
    size = (height or first[0], width or first[1])
    class_name = type(pipeline).__name__
    calls = table.CALLS_OF | table_moving.CALLS_OF
    own = calls.get(class_name, {})
    number = sizes.index(size) if size in sizes else 0
    frames = own.get("num_frames") or frame_count(pipeline, number)
    duration = seconds(pipeline, math.prod(TOKEN_ROWS[number]))
    one = takes_one_prompt(pipeline)
    batch_size = 1 if one else batch_size
    prompts = _prompts(class_name, text, batch_size)
    wanted: dict[str, Any] = {
        **dict.fromkeys(("prompt", "task_prompt", "content_prompt"), prompts),
        "height": size[0],
        "width": size[1],
        "num_inference_steps": num_inference_steps,
        "generator": torch.Generator("cpu").manual_seed(seed),
        "output_type": _known_output(pipeline, output_type),
        "max_sequence_length": SEQUENCE_LENGTHS[text],
        # Without these the picture is scaled to what the full model was trained on.
        "max_area": size[0] * size[1],
        "resolution": 64 * round(math.sqrt(size[0] * size[1]) / 64),
        "_auto_resize": False,
        **dict.fromkeys(FRAME_NAMES, frames),
        **dict.fromkeys(_SOUND_NAMES, duration),
        "mask_start_seconds": duration / 4,
        "mask_end_seconds": duration / 2,
        "lyrics": prompts,
        "class_labels": [7 * text + row for row in range(batch_size)],
        **table.CALLS,
        **own,
        **_guidance(pipeline, names, batch_size, guidance),
    }
    given = table_moving.GIVEN.get(type(pipeline).__name__, frozenset())
    if given or is_of_frames(names):
        wanted.update(_frames(type(pipeline), names, given, *size, batch_size))
    else:
        wanted.update(pictures(pipeline, *size, batch_size))
    if "audio" in given:
        wanted["audio"] = sound(pipeline, duration, batch_size)
    wanted.update(videos(type(pipeline), given, (frames, *size), batch_size))
    wanted.update(conditions(type(pipeline), given, (frames, *size)))
    if "prior_token_ids" in names:
        wanted["prior_token_ids"] = _prior_tokens(pipeline, wanted, batch_size, text)
    length = names.get("max_sequence_length")
    if length is not None and length.default is None:
        # The pipeline knows how much its own words around the prompt take.
        del wanted["max_sequence_length"]
    if one:
        wanted |= {n: v[0] for n, v in wanted.items() if n in _PROMPT_NAMES}
    return {name: value for name, value in wanted.items() if name in names}


def _prompts(class_name: str, text: int, batch_size: int) -> list[str]:
    """Prompts of one set, in the form that a pipeline reads."""
    texts = PROMPTS[text]
    prompts = [texts[i % len(texts)] for i in range(batch_size)]
    if form := table.PROMPT_FORMS.get(class_name):
        prompts = [form % json.dumps(prompt) for prompt in prompts]
    return prompts


def _frames(
    pipeline_class: type,
    names: Mapping[str, Any],
    given: frozenset[str],
    height: int,
    width: int,
    batch_size: int,
) -> dict[str, Any]:
    """Pictures for calls that make a video of them."""
    needed = {"control_image", "mask_image"} | {n for n in given if "image" in n}
    if {"strength", "mask_image"} & set(names):
        needed.add("image")
    needed |= {
        name for name in ("image",) if name in names and _is_required(names[name])
    }
    made = {
        name: [
            (mask if name == "mask_image" else picture)(height, width, row)
            for row in range(batch_size)
        ]
        for name in needed
    }
    return {
        name: several[0] if takes_one(pipeline_class, name) else several
        for name, several in made.items()
    }


def _known_output(pipeline: Any, output_type: str) -> str:
    """Decoded tensors where a pipeline cannot return its latents."""
    text = source_of(inspect.unwrap(type(pipeline).__call__))
    return "pt" if output_type == "latent" and '"latent"' not in text else output_type


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty


def _prior_tokens(
    pipeline: Any, wanted: dict[str, Any], batch_size: int, text: int
) -> torch.Tensor:
    """What a language model would write for the prompt: one code per image token."""
    config = pipeline.transformer.config
    side = _compression(pipeline) * config.patch_size
    count = (wanted["height"] // side) * (wanted["width"] // side)
    generator = torch.Generator().manual_seed(text)
    codes = config.prior_vq_quantizer_codebook_size
    return torch.randint(codes, (batch_size, count), generator=generator)


def _guidance(
    pipeline: Any, names: Any, batch_size: int, guidance: bool
) -> dict[str, Any]:
    """The scale that switches the second branch, and its prompt."""
    scale = next((name for name in _GUIDANCE_NAMES if name in names), None)
    if scale is None:
        return {}
    if not guidance:
        off = 0.0 if _guides_at_one(pipeline, scale) else 1.0
        return dict.fromkeys((scale, _SOUND_GUIDANCE), off)
    return {
        scale: GUIDANCE,
        _SOUND_GUIDANCE: GUIDANCE + 1,
        "negative_prompt": [NEGATIVE_PROMPT] * batch_size,
    }


def _guides_at_one(pipeline: Any, scale: str) -> bool:
    """Whether the class's own test is on at a scale of 1: some formulas start from 0."""
    test = getattr(type(pipeline), "do_classifier_free_guidance", None)
    if not isinstance(test, property) or test.fget is None:
        return False
    at_one = SimpleNamespace(**{f"_{scale}": 1.0, scale: 1.0}, config=pipeline.config)
    try:
        return bool(test.fget(at_one))
    except AttributeError:
        return False  # asks for more than the scale


def _cell(pipeline: Any) -> int:
    """Pixels along one side of a token: the VAE's compression times the patch."""
    compression = _compression(pipeline)
    config = pipeline.transformer.config
    patches = [config.get("patch_size"), config.get("all_patch_size")]
    patches.append(getattr(pipeline, "patch_size", None))
    largest = max(p[-1] if isinstance(p, list | tuple) else p or 1 for p in patches)
    packs = any(hasattr(pipeline, f"_{verb}_latents") for verb in ("pack", "patchify"))
    processor = getattr(pipeline, "image_processor", None)
    settings = getattr(processor, "config", {})  # a library's processor has none
    multiple = settings.get("vae_scale_factor", compression)
    if packs and largest == 1 and multiple > compression:
        largest = 2  # packed by the pipeline, in squares of two
    return int(compression * largest) * table.CELLS.get(type(pipeline).__name__, 1)


def _compression(pipeline: Any) -> int:
    """Pixels along one side of a latent."""
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        return 1
    for name in _SPATIAL_NAMES:
        if isinstance(getattr(pipeline, name, None), int):
            return int(getattr(pipeline, name))
    config = vae.config
    for name in ("spatial_compression_ratio", "scale_factor_spatial"):
        if config.get(name):
            return int(config[name])
    for name in ("block_out_channels", "encoder_block_out_channels", "dim_mult"):
        if config.get(name):
            return int(2 ** (len(config[name]) - 1))
    # Pipelines of sound have none.
    return int(getattr(pipeline, "vae_scale_factor", 1))
