"""Attention processors that a pipeline sets for some of its calls, beside those that it has.

Perturbed attention is such a call: a third branch, told from the others by its place in the
batch.  The processors are ported where blocks map and mix tokens with them as they do in other
calls; where not, they are refused when tokens are split.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from porter.analysis.facts import TransformerFacts
from porter.errors import Refusal
from porter.names import qualified_name
from porter.shrink import PROCESSOR_CALLS
from porter.verify.hooks import kept_processors

#: Measures the transformer in calls with guidance or without, and with these arguments.
Measure = Callable[[bool, Mapping[str, Any]], TransformerFacts]


def with_call_processors(
    pipeline: Any, name: str, facts: TransformerFacts, measure: Measure
) -> TransformerFacts:
    """The facts with the processors that calls of `PROCESSOR_CALLS` set, where they fit.

    Args:
        pipeline: the shrunken stock pipeline.
        name: the component.
        facts: of its other calls.
        measure: see `Measure`; it may raise what stock raises.
    """
    names = inspect.signature(type(pipeline).__call__).parameters
    more = {k: value for k, value in PROCESSOR_CALLS.items() if k in names}
    for guidance in (True, False) if more and not facts.whole else ():
        with kept_processors(pipeline):
            try:
                measured = measure(guidance, more)
            except (Refusal, RuntimeError, ValueError, TypeError, IndexError):
                continue
            if _without_processors(measured) == _without_processors(facts):
                set_now = _processors(getattr(pipeline, name), facts)
                facts = _joined(facts, measured, set_now)
    return facts


def _without_processors(facts: TransformerFacts) -> TransformerFacts:
    return replace(
        facts,
        processors=(),
        batch_processors=(),
        mixing=replace(facts.mixing, token_sums={}),
    )


def _processors(model: Any, facts: TransformerFacts) -> set[str]:
    """Classes of the processors that now serve the measured attention modules."""
    return {
        qualified_name(type(processor))
        for path, processor in model.attn_processors.items()
        if re.sub(r"\.\d+\.", ".*.", path.removesuffix(".processor")) in facts.attention
    }


def _joined(
    facts: TransformerFacts, measured: TransformerFacts, set_now: set[str]
) -> TransformerFacts:
    added = set_now - set(facts.processors)
    sums = {**measured.mixing.token_sums, **facts.mixing.token_sums}
    return replace(
        facts,
        processors=tuple(sorted({*facts.processors, *added})),
        batch_processors=tuple(sorted({*facts.batch_processors, *added})),
        mixing=replace(facts.mixing, token_sums=sums),
    )
