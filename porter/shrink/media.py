"""Videos for calls of pipelines, and how many frames they have.

Frames follow the rule of causal video VAEs: the first latent frame stands for one frame,
every further one for as many as the VAE compresses.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image

from . import table_moving
from .sources import source_of

LATENT_FRAMES = (5, 7, 5)
"""Latent frames of a video at each picture size: more than a 4-fold cut into patches
needs, odd, and not the same everywhere, so that their number is seen to vary."""

FRAME_TOKEN_ROWS = ((4, 6), (6, 5), (5, 8))
"""Token rows and columns of a frame at each picture size; a video has several frames."""

FRAME_NAMES = ("num_frames", "frames", "video_length")

SHIFT = 7
"""Pixels by which the stripes of a video move from frame to frame."""

CONDITION_STRENGTH = 0.8
"""How clean frames that a video is conditioned on are: neither like others nor fixed."""

_VIDEO = re.compile(r"(^|_)videos?$|^controls$")


def is_of_frames(names: Iterable[str]) -> bool:
    """Whether a call with these parameters makes or takes a video."""
    return any(name in FRAME_NAMES or _VIDEO.search(name) for name in names)


def frame_count(pipeline: Any, size: int) -> int:
    """Frames of a video at the picture size of that index."""
    latents = LATENT_FRAMES[size] * _temporal_patch(pipeline)
    return (latents - 1) * _temporal_compression(pipeline) + 1


def seconds(pipeline: Any, latents: int) -> float:
    """Length of sound that has about so many latent frames."""
    if hasattr(pipeline, "latents_per_second"):
        return latents / float(pipeline.latents_per_second)
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        return float(latents)
    places = (vae, vae.config, pipeline)
    rates = [_first(place, "sampling_rate", "sample_rate") for place in places]
    ratios = [_first(place, "downsampling_ratio", "hop_length") for place in places]
    rate, ratio = next(filter(None, rates), 1), next(filter(None, ratios), 1)
    # A little more, for bodies that round down.
    return (latents + 0.01) * float(ratio) / float(rate)


def sound(pipeline: Any, length: float, batch_size: int) -> torch.Tensor:
    """Noise of so many seconds, (B, channels, samples)."""
    config = pipeline.vae.config
    rate = _first(config, "sampling_rate", "sample_rate") or 1
    shape = (batch_size, _first(config, "audio_channels") or 1, int(length * rate))
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(batch_size))


def _first(place: Any, *names: str) -> int | None:
    return next(
        (v for n in names if isinstance(v := getattr(place, n, None), int)), None
    )


def videos(
    pipeline_class: type,
    given: frozenset[str],
    shape: tuple[int, int, int],
    batch_size: int,
) -> dict[str, Any]:
    """Arguments with videos: those that are required, and those in ``given``.

    Args:
        pipeline_class: whose ``__call__`` is served.
        given: optional ones to pass as well.
        shape: frames, height and width.
        batch_size: videos of an argument; one alone is a plain list of its frames.

    Returns:
        Lists of pictures, or tensors (B, C, F, H, W) from 0 to 1 where the hint says so.
    """
    found: dict[str, Any] = {}
    source = source_of(pipeline_class)
    call = inspect.signature(pipeline_class.__call__)
    for name, parameter in call.parameters.items():
        required = parameter.default is parameter.empty
        if not _VIDEO.search(name) or not (required or name in given):
            continue
        make = _mask_video if "mask" in name else _video
        made = [make(*shape, start=11 * row + len(name)) for row in range(batch_size)]
        if isinstance(parameter.annotation, type):
            found[name] = _tensor(made)
        else:
            # The body looks at the first frame: it expects the frames of one video.
            one = f"{name}[0].size" in source
            found[name] = made[0] if one or batch_size == 1 else made
    return found


def conditions(
    pipeline_class: type, given: frozenset[str], shape: tuple[int, int, int]
) -> dict[str, Any]:
    """Arguments in ``given`` that are lists of records of frames, made by the hint's class.

    A record with an index is of one picture: one stands at the start, one further on.

    Args:
        pipeline_class: whose ``__call__`` is served.
        given: names of arguments.
        shape: frames, height and width.
    """
    call = inspect.signature(pipeline_class.__call__)
    found: dict[str, Any] = {}
    for name in sorted(given & set(call.parameters)):
        hints = get_args(call.parameters[name].annotation)
        record: Any = next((hint for hint in hints if is_dataclass(hint)), None)
        if record is None:
            continue
        known = {entry.name for entry in fields(record)}
        # No codec compresses the picture.
        common = {
            "strength": CONDITION_STRENGTH,
            **({"crf": 0} if "crf" in known else {}),
        }
        video = _video(*shape, start=len(name))
        found[name] = [record(frames=video, **common)]
        if "index" in known:
            places = ((video[0], 0), (video[-1], 2))
            found[name] = [record(frames=f, index=i, **common) for f, i in places]
    return found


def takes_one(pipeline_class: type, name: str) -> bool:
    """Whether an argument is one picture: checks of the class's own leave out lists."""
    if pipeline_class.__name__ in table_moving.ONE_PICTURE:
        return True
    check = getattr(pipeline_class, "check_inputs", None)
    if check is None:
        return False
    tree = ast.parse(textwrap.dedent(source_of(check)))
    kinds = {
        ast.unparse(node.args[1])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "isinstance"
        and ast.unparse(node.args[0]) == name
    }
    return bool(kinds) and not any("list" in kind for kind in kinds)


def _temporal_compression(pipeline: Any) -> int:
    """Frames of one latent frame; the first one stands for itself."""
    return next(
        (
            int(value)
            for name, value in vars(pipeline).items()
            if name.startswith("vae_") and "temporal" in name and isinstance(value, int)
        ),
        1,
    )


def _temporal_patch(pipeline: Any) -> int:
    """Latent frames of one token."""
    config = pipeline.transformer.config
    patch = config.get("patch_size_t") or config.get("patch_size")
    return int(patch[0] if isinstance(patch, list | tuple) and len(patch) == 3 else 1)


def _video(frames: int, height: int, width: int, start: int) -> list[Image.Image]:
    """Stripes that move."""
    stripes = np.indices((height, width)).sum(axis=0)
    pictures = [(stripes + start + SHIFT * number) % 256 for number in range(frames)]
    return [Image.fromarray(p.astype(np.uint8)).convert("RGB") for p in pictures]


def _mask_video(frames: int, height: int, width: int, start: int) -> list[Image.Image]:
    """A white part that grows."""
    columns = np.indices((height, width))[1]
    edges = [width // 2 + start % 5 + number for number in range(frames)]
    return [
        Image.fromarray(np.uint8(255) * (columns < edge).astype(np.uint8))
        for edge in edges
    ]


def _tensor(made: list[list[Image.Image]]) -> torch.Tensor:
    """Videos as (B, C, F, H, W) from 0 to 1."""
    arrays = [np.stack([np.atleast_3d(np.asarray(p)) for p in video]) for video in made]
    return torch.from_numpy(np.stack(arrays)).permute(0, 4, 1, 2, 3).float() / 255
