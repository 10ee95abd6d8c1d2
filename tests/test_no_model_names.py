"""Rules, analyses and the runtime know no model: none of diffusers' names stands in them."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import diffusers
import pytest

from porter.source import pipeline_classes

ROOT = Path(__file__).parents[1]
FOLDERS = ("porter/rules", "porter/analysis", "xfuser_runtime")
#: What class names have beside the model's.
KINDS = r"(Pipeline|Transformer|ControlNet|Model|[23]D|Img2Img|Inpaint|TextToImage|ImageToVideo).*"


@functools.cache
def model_names() -> set[str]:
    """The models of pipelines and transformers, for example `PixArtAlpha` and `PixArt`."""
    classes = {
        *pipeline_classes(),
        *(name for name in dir(diffusers) if re.search(r"Transformer.*Model$", name)),
    }
    names = {re.sub(KINDS, "", name) for name in classes}
    return {name for name in names if len(name) > 2}


def named(text: str) -> list[str]:
    """The names of models in a text."""
    names = "|".join(sorted(model_names(), key=len, reverse=True))
    return re.findall(rf"\b(?:xFuser)?({names})(?![a-z])", text)


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_model_is_named(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = {
        str(path.relative_to(ROOT)): names
        for path in files
        if (names := named(path.read_text(encoding="utf-8")))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("run PixArtAlphaPipeline", ["PixArtAlpha"]),
        ("class xFuserFluxTransformer", ["Flux"]),
        ("if name == 'WanVACE':", ["WanVACE"]),
        ("it is Wanted, as xDiT does", []),
    ],
)
def test_names_are_found(text: str, names: list[str]) -> None:
    assert named(text) == names
