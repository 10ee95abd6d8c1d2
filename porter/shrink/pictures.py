"""Pictures and masks for calls that cannot do without them, read from ``__call__``.

Which arguments hold pictures, and which of them a call needs, is for `porter.tasks` to
say; what form a picture takes stands in the type hint.
"""

from __future__ import annotations

import inspect
import re
import typing
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from porter import source
from porter.tasks import needed_arguments

from . import table

_PICTURE = re.compile(r"(?:^|_)(image|mask)s?(?:_reference)?$")
_NOT_OF_PIXELS = re.compile(
    r"ip_adapter|attention_mask|embeds|padding_mask|latents|text_"
)
"""Masks of texts and of proteins, and pictures for encoders that stay out."""

WEIGHTS = np.array([[3, 5], [7, 2], [-4, 6]])
"""Change of each colour along rows and columns: no two rows, columns or colours agree."""


def pictures(pipeline: Any, height: int, width: int, batch_size: int) -> dict[str, Any]:
    """Arguments with pictures that a call of ``pipeline`` needs.

    Args:
        pipeline: whose ``__call__`` is served; its VAE says how many colours it reads.
        height, width: pixels of every picture.
        batch_size: pictures an argument holds, where its hint allows several.

    Returns:
        A picture, or a list of them, by argument.  Every one differs from the others.
    """
    found: dict[str, Any] = {}
    # A port answers for the class that it was made from.
    pipeline_class = pipeline.__class__
    count = table.PICTURES_OF_ONE_PROMPT.get(pipeline_class.__name__, batch_size)
    vae = getattr(pipeline, "vae", None)
    with_alpha = vae is not None and vae.config.get("input_channels") == 4
    for number, (name, depth) in enumerate(_arguments(pipeline_class).items()):
        numbers = [10 * number + row for row in range(count)]
        if "mask" in name:
            made = [mask(height, width, each) for each in numbers]
        else:
            made = [picture(height, width, each) for each in numbers]
        if with_alpha:
            made = [each.convert("RGBA") for each in made]
        forms = made[0], made, [[each] for each in made]
        is_grid = pipeline_class.__name__ in table.GRIDS
        found[name] = [_grid(each) for each in made] if is_grid else forms[depth]
    return found


def _grid(first: Image.Image) -> list[list[Image.Image | None]]:
    """A row of an example, and one with a place to fill."""
    return [[first, first.rotate(180)], [first.rotate(90), None]]


@cache
def _arguments(pipeline_class: type) -> dict[str, int]:
    """Arguments that need a picture, and how deep their lists are (0: one picture)."""
    reference = f"{pipeline_class.__module__}:{pipeline_class.__qualname__}"
    node = source.class_node(source.load(reference))
    parameters = inspect.signature(pipeline_class.__call__).parameters
    names = [
        name
        for name in needed_arguments(node)
        if _PICTURE.search(name) and not _NOT_OF_PIXELS.search(name)
    ]
    if all("mask" in name for name in names):
        names = []  # masks of an optional picture
    if (edited := table.EDITED.get(pipeline_class.__name__)) is not None:
        names.append(edited)
    return {name: _depth(parameters[name].annotation) for name in names}


def _depth(hint: Any) -> int:
    """How deep the lists of a type hint are; most bodies take a list without a hint."""
    if hint is inspect.Parameter.empty:
        return 1
    if isinstance(hint, str):
        return int("list" in hint.lower() or "PipelineImageInput" in hint)
    inside = max((_depth(part) for part in typing.get_args(hint)), default=0)
    return inside + 1 if typing.get_origin(hint) is list else inside


def picture(height: int, width: int, number: int) -> Image.Image:
    """Slanted stripes, with another slant and another start in each colour."""
    places = np.moveaxis(np.indices((height, width)), 0, -1)
    stripes = places @ WEIGHTS.T + 40 * number
    return Image.fromarray((stripes % 256).astype(np.uint8), "RGB")


def mask(height: int, width: int, number: int) -> Image.Image:
    """White below a slanted line, black above; the middle of the picture is mixed."""
    rows, columns = np.indices((height, width))
    white = 2 * rows * width + columns * height > (2 + number % 2) * height * width / 2
    return Image.fromarray(np.uint8(255) * white.astype(np.uint8), "L")
