"""A tiny checkpoint folder for any pipeline class, made without a hub.

The folder is written by ``save_pretrained`` and read by the stock ``from_pretrained``.
Components come from the type hints of the pipeline's ``__init__``.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import table
from .components import Components
from .errors import ShrinkError
from .fit import fit_widths
from .sizes import BLOCKS
from .torchvision_names import provide

Overrides = Mapping[str, Mapping[str, Any]]


def make_checkpoint(
    pipeline_class: Any,
    directory: str | Path,
    *,
    seed: int = 0,
    overrides: Overrides | None = None,
    blocks: int = BLOCKS,
) -> Path:
    """Write a tiny checkpoint of ``pipeline_class`` with lively random weights.

    Args:
        pipeline_class: a ``DiffusionPipeline`` subclass, of diffusers or of anyone.
        directory: the folder to write; made when it is missing.
        seed: of the weights; equal seeds give equal bytes.
        overrides: configuration entries per component, over the derived ones.
        blocks: of the backbone's first loop; more of them allow more stages.

    Returns:
        The folder, for ``pipeline_class.from_pretrained(folder)``.

    Raises:
        ShrinkError: a component cannot be derived from its hint.
    """
    folder = Path(directory)
    make_pipeline(
        pipeline_class, seed=seed, overrides=overrides, blocks=blocks
    ).save_pretrained(folder)
    return folder


def make_pipeline(
    pipeline_class: Any,
    *,
    seed: int = 0,
    overrides: Overrides | None = None,
    blocks: int = BLOCKS,
) -> Any:
    """The tiny pipeline itself, in memory; arguments as of :func:`make_checkpoint`."""
    provide()
    hints = component_hints(pipeline_class)
    merged = _merge(table.for_pipeline(pipeline_class), overrides or {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        components = Components(pipeline_class, hints, merged, seed, blocks)
        pipeline = pipeline_class(**components.build())
        fit_widths(pipeline, components)
    return pipeline


def component_hints(pipeline_class: Any) -> dict[str, Any]:
    """The type of each parameter of ``__init__``, unions reduced to their first member.

    Raises:
        ShrinkError: a parameter has no hint and no default.
    """
    parameters = inspect.signature(pipeline_class.__init__).parameters
    resolved = typing.get_type_hints(pipeline_class.__init__)
    hints: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if name == "self" or parameter.kind is parameter.VAR_KEYWORD:
            continue
        if name not in resolved and parameter.default is parameter.empty:
            raise ShrinkError(
                f"{pipeline_class.__name__}.__init__ has no type hint for {name!r}",
                expected="a component class",
            )
        hints[name] = _first_member(resolved.get(name))
    return hints


def _first_member(hint: Any) -> Any:
    """`A | B | None` and `Union[A, B]` give A."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [m for m in typing.get_args(hint) if m is not type(None)]
        return _first_member(members[0])
    return hint


def _merge(first: Overrides, second: Overrides) -> dict[str, dict[str, Any]]:
    names = {*first, *second}
    return {n: {**first.get(n, {}), **second.get(n, {})} for n in names}
