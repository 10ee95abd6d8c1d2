"""Measures everything that the rules need to know about one pipeline."""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from porter.analysis.facts import PipelineFacts, TransformerFacts
from porter.errors import Refusal
from porter.parsed import ParsedModule
from porter.probe.call_processors import with_call_processors
from porter.probe.capture import TransformerCall
from porter.probe.first_steps import FirstSteps
from porter.probe.guidance import BATCHES, Guidance, measure_guidance
from porter.probe.helpers import models_on_latents
from porter.probe.loop_probe import BATCHED
from porter.probe.stages import unfit_for_stages
from porter.probe.stock import upstream_runs
from porter.probe.transformer import probe_transformer
from porter.shrink import call_kwargs, make_checkpoint, takes_one_prompt
from porter.source import is_transformer

VARIANTS = ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1))
"""(image size, text) of the runs, as indices."""
ParsedOf = Callable[[type], ParsedModule]


def probe_pipeline(pipeline_class: type, parsed_of: ParsedOf) -> PipelineFacts:
    """Facts of `pipeline_class`, measured on a shrunken copy.

    Args:
        pipeline_class: the stock class.
        parsed_of: gives the parsed module that defines a class.

    Raises:
        Refusal: no tiny copy can be made, or it denoises with no transformer.
    """
    with tempfile.TemporaryDirectory() as folder, upstream_runs(pipeline_class):
        make_checkpoint(pipeline_class, folder)
        pipeline = pipeline_class.from_pretrained(folder)  # type: ignore[attr-defined]
    pipeline.set_progress_bar_config(disable=True)
    steps = FirstSteps(pipeline)
    with upstream_runs(pipeline_class):
        guidance, runs = _measured_runs(pipeline, steps)
        batched = _batched_runs(steps)
        called = _called_each_step(steps, runs[0])
        kwargs_of = functools.partial(call_kwargs, pipeline, num_inference_steps=2)
        helpers = models_on_latents(pipeline, kwargs_of, called)
    transformers = {
        name: _transformer_facts(
            pipeline,
            steps,
            name,
            parsed_of(type(getattr(pipeline, name))),
            [calls[name] for calls in runs],
            [calls[name] for calls in batched if name in calls],
        )
        for name in runs[0]
        if is_transformer(name) and all(name in calls for calls in runs)
    }
    if not transformers:
        raise Refusal(
            f"{pipeline_class.__name__} calls no transformer in its first step",
            expected="a denoising transformer",
        )
    return PipelineFacts(
        guidance.style,
        guidance.axes,
        transformers,
        helpers,
        guidance.helper_axes,
        unfit_for_stages(pipeline, runs[0], transformers, called),
    )


def _called_each_step(steps: FirstSteps, calls: Iterable[str]) -> tuple[str, ...]:
    """Those of the called components, besides transformers, that each step calls."""
    names = tuple(name for name in calls if not is_transformer(name))
    return steps.called_each_step(names) if names else ()


def _transformer_facts(
    pipeline: Any,
    steps: FirstSteps,
    name: str,
    source: ParsedModule,
    calls: list[TransformerCall],
    batched: list[TransformerCall],
) -> TransformerFacts:
    """Facts of one transformer; of one that ranks cannot share, the reason alone.

    Its calls can be split all the same: between the branches of guidance, and by prompts.
    """
    model = getattr(pipeline, name)
    try:
        facts = probe_transformer(model, source, calls, VARIANTS, batched)
    except Refusal as refusal:
        where = refusal.where or source.where(source.class_def(type(model).__name__))
        return TransformerFacts((), {}, (), (), whole=f"{where}: {refusal.found}")

    def measure(guidance: bool, more: Mapping[str, Any]) -> TransformerFacts:
        found = [
            steps.first_calls(size, text, rows, guidance, more)[name]
            for rows, pairs in ((1, VARIANTS), (2, BATCHED))
            for size, text in pairs
        ]
        single, several = found[: len(VARIANTS)], found[len(VARIANTS) :]
        return probe_transformer(model, source, single, VARIANTS, several)

    return with_call_processors(pipeline, name, facts, measure)


def _measured_runs(
    pipeline: Any, steps: FirstSteps
) -> tuple[Guidance, list[dict[str, TransformerCall]]]:
    """How guidance reaches the transformers, and the first calls of each variant."""

    def calls_of(
        *, batch_size: int, guidance: bool, text: int = 0
    ) -> tuple[TransformerCall, ...]:
        return steps.calls(0, text, batch_size, guidance)

    batches = BATCHES[:1] if takes_one_prompt(pipeline) else BATCHES
    guidance = measure_guidance(pipeline, calls_of, batches)
    runs = []
    for size, text in VARIANTS:
        with _own_size(pipeline, size):
            runs.append(steps.first_calls(size, text))
    return guidance, runs


@contextmanager
def _own_size(pipeline: Any, number: int) -> Iterator[None]:
    """Where a call takes no size, the model's own is another one for each number."""
    model = getattr(pipeline, "transformer", None)
    own = model.config.get("sample_size") if model is not None else None
    names = inspect.signature(type(pipeline).__call__).parameters
    if model is None or "height" in names or not isinstance(own, int):
        yield
        return
    step = model.config.get("patch_size") or 1
    model.register_to_config(sample_size=own + 2 * step * number)
    try:
        yield
    finally:
        model.register_to_config(sample_size=own)


def _batched_runs(steps: FirstSteps) -> list[dict[str, TransformerCall]]:
    """The first calls with two prompts of different lengths.

    Only these have padding masks in models that make a mask where it masks something.
    None where stock takes one prompt alone.
    """
    try:
        return [steps.first_calls(size, text, 2) for size, text in BATCHED]
    except (RuntimeError, ValueError, TypeError, IndexError):
        return []
