"""Measures the token axes and the attention of one transformer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import libcst as cst
import torch
from torch import nn

from porter.analysis.block_loops import BlockLoop, find_block_loops, find_method
from porter.analysis.facts import LoopFacts, TransformerFacts
from porter.errors import Refusal
from porter.names import qualified_name
from porter.parsed import ParsedModule
from porter.probe.capture import TransformerCall, copied
from porter.probe.latents import LatentProbe
from porter.probe.loop_probe import LoopProbe, Variant
from porter.probe.loop_runs import LoopRun, run_loops, run_swapped
from porter.probe.mixing import MixingProbe, mixing_facts
from porter.probe.neighbours import OF_TOKENS, mixing_neighbour
from porter.probe.provenance import KeyOrigins, Leaf
from porter.probe.rank_run import Remedies
from porter.probe.stock import upstream_runs
from porter.probe.tail import measure_tail


def probe_transformer(
    model: nn.Module,
    source: ParsedModule,
    calls: Sequence[TransformerCall],
    variants: Sequence[Variant],
    batched: Sequence[TransformerCall] = (),
) -> TransformerFacts:
    """Facts of `model` from calls at several image sizes and text lengths.

    Args:
        model: the shrunken stock model.
        source: the module that defines its class.
        calls: one call a variant.
        variants: (image size, text) of each call, as indices; the first two differ in the
            image size alone.
        batched: calls with two samples of different text lengths, for the values that
            only such calls have.

    Raises:
        Refusal: a token-indexed value or an attention that no mechanism covers.
    """
    owner = source.class_def(type(model).__name__)
    forward = find_method(source, owner, "forward")
    loops = find_block_loops(source, forward)
    with upstream_runs(type(model)):
        run_call = functools.partial(run_loops, model, source, forward, loops)
        runs = [run_call(call) for call in calls]
        batched_runs = _runs_of_batches(model, run_call, batched)
    facts: list[LoopFacts] = []
    attention: dict[str, tuple[str, ...]] = {}
    queries: dict[str, tuple[str, ...]] = {}
    processors: dict[str, None] = {}
    mixing: list[tuple[str, Remedies, dict[str, str]]] = []
    refused: dict[str, str] = {}
    tokens = [LatentProbe(model, source, forward, loops, call) for call in calls]
    for loop in loops:
        seen = [run[loop.blocks] for run in runs if loop.blocks in run]
        if len(seen) != len(calls):
            continue
        padded = [run[loop.blocks] for run in batched_runs if loop.blocks in run]
        trace = functools.partial(_traced, model, source, forward, loop, calls[0])
        measured = LoopProbe(
            source, loop, seen, variants, tokens, padded, trace
        ).measure()
        if measured is None:
            continue
        samples = [(calls[0], measured.lengths(seen[0]))]
        samples += [(batched[0], measured.lengths(run)) for run in padded[:1]]
        integers = [run.integers for run in seen]
        refused |= _refused_beside(model, source, loop, *samples[0])
        for blocks in (loop.blocks, *loop.companions):
            probe = MixingProbe(model, source, forward, loop, blocks)
            keys = measured.keys if blocks == loop.blocks else {}
            remedies, counts = probe.measure(measured.facts, keys, samples, integers)
            mixing.append((blocks, remedies, counts))
        facts.append(_with_classes(measured.facts, model, loop))
        attention.update(measured.attention)
        queries.update(measured.queries)
        processors.update(dict.fromkeys(measured.processors))
    if not facts:
        raise Refusal(
            f"no loop over transformer blocks in {type(model).__name__}.forward",
            expected="a loop that carries the image tokens",
            where=source.where(forward),
        )
    shown = [*calls[:2], *(batched[:1] if batched_runs else ())]
    facts[-1] = _with_tail(facts[-1], model, source, forward, loops, shown)
    found = mixing_facts(mixing, source.where(forward))
    found = replace(found, refused={**found.refused, **refused})
    for path in found.summing:
        attention.setdefault(path, ())
    return TransformerFacts(
        tuple(facts),
        attention,
        tuple(sorted({*processors, *found.token_sums})),
        _layers(model, loops),
        queries,
        found,
    )


def _runs_of_batches(
    model: nn.Module,
    run: Callable[[TransformerCall], dict[str, LoopRun]],
    calls: Sequence[TransformerCall],
) -> list[dict[str, LoopRun]]:
    """What the loops see in calls with two samples.

    None where the model itself fails on such a call, which its pipeline takes.
    """
    try:
        return [run(call) for call in calls]
    except (RuntimeError, ValueError, TypeError, IndexError):
        try:
            with torch.no_grad():
                for call in calls:
                    model(**copied(call.arguments))
        except (RuntimeError, ValueError, TypeError, IndexError):
            return []
        raise


def _refused_beside(
    model: nn.Module,
    source: ParsedModule,
    loop: BlockLoop,
    call: TransformerCall,
    lengths: Mapping[str, int],
) -> dict[str, str]:
    """The ways of splitting that a module beside the blocks prevents, with the reason."""
    run = functools.partial(model.forward, **copied(call.arguments))
    neighbour = mixing_neighbour(model, loop, lengths, run)
    if not neighbour:
        return {}
    reason = f"{source.where(loop.node)}: {neighbour} beside the blocks mixes tokens"
    return dict.fromkeys(OF_TOKENS, reason)


def _traced(
    model: nn.Module,
    source: ParsedModule,
    forward: cst.FunctionDef,
    loop: BlockLoop,
    call: TransformerCall,
    axes: Mapping[Leaf, int],
    carried: set[str],
) -> KeyOrigins:
    """The origins of the keys of a loop's first block in one call of the model."""
    replay = functools.partial(run_swapped, model, source, forward, loop, call)
    return KeyOrigins(getattr(model, loop.blocks)[0], axes, carried).run(replay)


def _with_classes(facts: LoopFacts, model: nn.Module, loop: BlockLoop) -> LoopFacts:
    """The facts of a loop with the classes in its block lists."""
    return replace(
        facts,
        classes=_classes(model, loop.blocks),
        companions={name: _classes(model, name) for name in loop.companions},
    )


def _with_tail(
    facts: LoopFacts,
    model: nn.Module,
    source: ParsedModule,
    forward: cst.FunctionDef,
    loops: Sequence[BlockLoop],
    calls: Sequence[TransformerCall],
) -> LoopFacts:
    """The facts of the last loop with what runs token by token behind it.

    The calls are of two image sizes and, where the model takes them, of several samples.
    """
    loop = next(loop for loop in loops if loop.blocks == facts.blocks)
    tail = measure_tail(model, source, forward, loop, facts, calls)
    return replace(facts, tail=tail)


def _classes(model: nn.Module, blocks: str) -> tuple[str, ...]:
    """Names of the classes in a block list."""
    return tuple(sorted({type(block).__name__ for block in getattr(model, blocks)}))


def _layers(model: nn.Module, loops: Sequence[BlockLoop]) -> tuple[str, ...]:
    """Classes of convolutions and patch embeddings outside the blocks."""
    block_lists = {name for loop in loops for name in (loop.blocks, *loop.companions)}
    found = set()
    for path, module in model.named_modules():
        if path.split(".")[0] not in block_lists and (
            isinstance(module, nn.Conv2d) or type(module).__name__ == "PatchEmbed"
        ):
            found.add(qualified_name(type(module)))
    return tuple(sorted(found))
