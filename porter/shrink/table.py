"""What cannot be derived from a class, each entry with its reason.

Keys are names of pipeline classes; values are configuration entries per component.  A
component's entry ``class`` names the class to build instead of the hint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LEFT_OUT = frozenset({"safety_checker", "feature_extractor", "image_encoder"})
"""Components that text to image runs do without: they judge or condition on pictures."""

_PIPELINES: dict[str, dict[str, dict[str, Any]]] = {
    # Shares its backbone class, whose default sample size switches micro-conditions on,
    # with a pipeline that passes them; this one passes None.
    "PixArtSigmaPipeline": {"transformer": {"use_additional_conditions": False}},
}


def for_pipeline(pipeline_class: type) -> Mapping[str, Mapping[str, Any]]:
    """The entries of one class; empty for most."""
    return _PIPELINES.get(pipeline_class.__name__, {})
