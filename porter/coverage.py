"""What the rules for `__call__` make of every pipeline in the installed diffusers."""

from __future__ import annotations

from typing import Any

from porter import source
from porter.analysis.facts import PipelineFacts
from porter.analysis.pipeline_source import analyse_pipeline
from porter.errors import PorterError
from porter.port import rewrite
from porter.render import Rewritten, render
from porter.rules.context import PipelineContext
from porter.rules.pipeline import RULES


def survey() -> list[dict[str, Any]]:
    """One row a pipeline: name, status, notes."""
    return [_row(name) for name in source.pipeline_classes()]


def rewrite_unmeasured(name: str) -> Rewritten:
    """A pipeline's `__call__` by what its source shows, with no model run.

    The axes that guidance doubles are left out, so this text is for a survey only.

    Raises:
        PorterError: the rules refuse it.
    """
    upstream = source.load(name)
    denoisers = source.denoiser_parameters(source.class_node(upstream))
    shape = analyse_pipeline(upstream.module, upstream.class_name, denoisers)
    context = PipelineContext(shape, PipelineFacts(shape.cfg_style, {}, {}))
    return rewrite("pipeline", upstream, RULES, context, shape.call)


def _row(name: str) -> dict[str, Any]:
    try:
        unit = rewrite_unmeasured(name)
        render([unit])
    except PorterError as error:
        return {"name": name, "status": "refused", "notes": [str(error)]}
    notes = [f"without {m}: {why}" for m, why in sorted(unit.refused_modes.items())]
    return {"name": name, "status": "ported", "notes": notes}
