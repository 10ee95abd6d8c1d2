"""Every pipeline of the installed diffusers is ported or refused, never a crash.

The text that comes out compiles, and every name in it is resolved: a name that is not
makes `render` refuse.
"""

from __future__ import annotations

import os
import statistics
from collections import Counter

import pytest

from porter import source
from porter.analysis.facts import PipelineFacts
from porter.analysis.pipeline_source import analyse_pipeline
from porter.diff import changed_lines, hunks
from porter.errors import PorterError
from porter.port import rewrite
from porter.render import Rewritten, render
from porter.rules.context import PipelineContext, measured_as
from porter.rules.pipeline import RULES

NAMES = source.pipeline_classes()
# The suite takes a sample; PORTER_SWEEP=1 takes all of them.
STRIDE = int(os.environ.get("PORTER_SWEEP", "6"))


@pytest.fixture(scope="module")
def results() -> dict[str, Rewritten | PorterError]:
    """What becomes of each pipeline of the sample."""
    return {name: port(name) for name in NAMES[::STRIDE]}


def rewrite_unmeasured(name: str) -> Rewritten:
    """A pipeline's `__call__` by what its source shows, with no model run."""
    upstream = source.load(name)
    denoisers = source.denoiser_parameters(source.class_node(upstream))
    shape = analyse_pipeline(upstream.module, upstream.class_name, denoisers)
    facts = PipelineFacts(measured_as(shape.cfg_style), {}, {})
    context = PipelineContext(shape, facts)
    return rewrite("pipeline", upstream, RULES, context, shape.call)


def port(name: str) -> Rewritten | PorterError:
    """The rewritten class, or the reason why not; any other exception is a failure."""
    try:
        unit = rewrite_unmeasured(name)
        render([unit])
    except PorterError as error:
        return error
    return unit


def test_there_are_pipelines_to_port() -> None:
    assert len(NAMES) > 100
    assert {"PixArtAlphaPipeline", "PixArtSigmaPipeline"} <= set(NAMES)


def test_most_are_ported(results: dict[str, Rewritten | PorterError]) -> None:
    kinds = Counter(type(result).__name__ for result in results.values())
    assert kinds["Rewritten"] >= 0.75 * len(results)


def test_refusals_are_one_line_with_a_place(
    results: dict[str, Rewritten | PorterError],
) -> None:
    for result in results.values():
        if isinstance(result, PorterError):
            assert "\n" not in str(result)
            assert ".py:" in str(result)
            assert result.expected


def test_ports_are_small(results: dict[str, Rewritten | PorterError]) -> None:
    sizes = [changed_lines(r) for r in results.values() if isinstance(r, Rewritten)]
    assert statistics.median(sizes) <= 40


def test_every_hunk_names_a_rule(results: dict[str, Rewritten | PorterError]) -> None:
    for result in results.values():
        if isinstance(result, Rewritten):
            for hunk in hunks(result, render([result])):
                assert hunk.rules and hunk.manual


def test_the_same_text_twice(results: dict[str, Rewritten | PorterError]) -> None:
    name = next(n for n, r in results.items() if isinstance(r, Rewritten))
    again = port(name)
    assert isinstance(again, Rewritten)
    assert render([again]) == render([results[name]])  # type: ignore[list-item]
