"""How many channels the latents have, from what a pipeline computes them of."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from porter import source

LIMIT = 2048
"""More channels than any backbone takes."""


def latents_of(pipeline_class: type) -> Callable[[int], int] | None:
    """Channels of the latents as a function of the backbone's ``in_channels``.

    Pipelines whose backbone gets more than the latents (a packed square of them, a
    picture of control beside them) say how much: ``self.transformer.config.in_channels
    // 8``.  None where the class has no such expression, or several that differ.
    """
    reference = f"{pipeline_class.__module__}:{pipeline_class.__qualname__}"
    node = source.class_node(source.load(reference))
    found = {
        text
        for part in ast.walk(node)
        if isinstance(part, ast.Assign)
        and "latent" in ast.unparse(part.targets[0])
        and (text := _expression(part.value))
    }
    if len(found) != 1:
        return None
    code = compile(found.pop(), pipeline_class.__name__, "eval")
    return lambda channels: int(eval(code, {"__builtins__": {}}, {_NAME: channels}))


@dataclass(frozen=True)
class Channels:
    """Channels that a backbone and its VAE agree on.

    Attributes:
        latents: of the VAE; None keeps its default.
        backbone: entries of the backbone's configuration.
    """

    latents: int | None
    backbone: Mapping[str, int]


def agreed_channels(
    pipeline_class: type,
    backbone: Mapping[str, Any],
    changes: Mapping[str, Any],
    vae: Mapping[str, Any],
) -> Channels:
    """What a backbone and a VAE of small size have to have.

    Args:
        pipeline_class: the pipeline that feeds the one from the other.
        backbone, vae: defaults of their classes.
        changes: entries that the backbone gets in any case.
    """
    packed = 4 if hasattr(pipeline_class, "_pack_latents") else 1
    channels: int | None = changes.get("in_channels") or backbone.get("in_channels")
    function = latents_of(pipeline_class)
    if channels is None:
        return Channels(None, {})
    if function and function(channels) == channels:
        packed = 1  # as many as the backbone takes: what is packed is no square of them
    entries: dict[str, int] = {}
    latents: int | None
    is_free = "block_out_channels" in vae and vae["latent_channels"] == 4
    if is_free:
        # Its default is not meant for this backbone.
        latents = function(channels) if function else channels // packed
    else:
        latents = vae.get("latent_channels") or vae.get("z_dim")
        needed = _inverse(function, latents) if function and latents else None
        if latents and packed == 1 and channels == latents * _of_patch(vae):
            # A token is a whole patch of the VAE's, with its channels one by one.
            packed, needed = _of_patch(vae), channels
        if needed is not None and "in_channels" not in changes and needed != channels:
            entries["in_channels"] = int(needed)
            channels = int(needed)
    is_open = "out_channels" in backbone and "out_channels" not in changes
    if function and latents and channels != packed * latents and is_open:
        # The backbone gets more than the latents, and gives back no more than them.
        entries["out_channels"] = packed * latents
    return Channels(latents if is_free else None, entries)


def _of_patch(vae: Mapping[str, Any]) -> int:
    """Places of a patch whose channels a VAE normalises as one; 1 where it has none."""
    patch = vae.get("patch_size")
    return math.prod(patch) if isinstance(patch, Sequence) else 1


def _inverse(latents: Callable[[int], int], channels: int) -> int | None:
    """The fewest ``in_channels`` for which the latents have ``channels``."""
    return next((n for n in range(1, LIMIT) if latents(n) == channels), None)


_NAME = "in_channels"


class _Rename(ast.NodeTransformer):
    def visit_Attribute(self, node: ast.Attribute) -> Any:
        text = ast.unparse(node)
        known = text.startswith("self.transformer.") and text.endswith(f".{_NAME}")
        return ast.Name(_NAME, ast.Load()) if known else node


def _expression(value: ast.expr) -> str:
    """The arithmetic on ``in_channels`` alone, else ''."""
    text = ast.unparse(_Rename().visit(ast.parse(ast.unparse(value), mode="eval")))
    names = {n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)}
    plain = not any(
        isinstance(n, ast.Attribute | ast.Call) for n in ast.walk(ast.parse(text))
    )
    return text if names == {_NAME} and plain else ""
