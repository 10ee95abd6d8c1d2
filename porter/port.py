"""The whole way of a port: load, analyse, measure, rewrite, render."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import libcst as cst

from porter import __version__, source
from porter.analysis.facts import (
    PipelineFacts,
    TransformerFacts,
    facts_from_json,
    to_json,
)
from porter.analysis.forward import Forward
from porter.analysis.merge import merged
from porter.analysis.pipeline_source import PipelineSource, analyse_pipeline
from porter.analysis.processor import Processor
from porter.diff import changed_lines
from porter.errors import PorterError, Refusal
from porter.names import output_path, wrapper_name
from porter.render import Rewritten, render
from porter.rules import attention, pipeline, transformer
from porter.rules.base import Rule
from porter.rules.context import PipelineContext
from porter.rules.engine import apply_rules
from porter.source import LIBRARY, Upstream


@dataclass(frozen=True)
class Port:
    """A rewritten pipeline with everything it needs.

    Attributes:
        name: the class, or `module:Class` outside diffusers.
        upstream: the pipeline class.
        facts: what was measured.
        classes: the rewritten classes, the pipeline first.
    """

    name: str
    upstream: Upstream
    facts: PipelineFacts
    classes: tuple[Rewritten, ...]

    def paths(self) -> set[str]:
        """Paths of the files that hold the classes."""
        return {output_path(unit.kind, unit.upstream.module) for unit in self.classes}


def make_port(name: str, facts: PipelineFacts | None = None) -> Port:
    """Ports one pipeline.

    Args:
        name: a class of diffusers, or `package.module:ClassName`.
        facts: measured before; None measures them now.

    Raises:
        PorterError: no such class, or the port would not be right.
    """
    upstream, shape = read_pipeline(name)
    facts = facts or _measure(upstream)
    context = PipelineContext(shape, facts)
    classes = [
        rewrite("pipeline", upstream, pipeline.RULES, context, shape.call),
        *_transformers(upstream, facts),
        *_processors(facts),
    ]
    return Port(_port_name(upstream), upstream, facts, tuple(classes))


def read_pipeline(name: str) -> tuple[Upstream, PipelineSource]:
    """A pipeline class and what its source shows.

    Raises:
        PorterError: no such class, or no pipeline that denoises with a transformer.
    """
    upstream = source.load(name)
    denoisers = source.denoiser_parameters(source.class_node(upstream))
    shape = analyse_pipeline(upstream.module, upstream.class_name, denoisers)
    return upstream, shape


def render_ports(ports: Iterable[Port]) -> dict[str, str]:
    """The text of every generated file, by path below the output folder.

    Classes that several ports share stand in one file, once, in alphabetical order; a
    transformer serves all of them.

    Raises:
        Refusal: two ports use a transformer in ways that contradict each other.
    """
    files: dict[str, dict[str, Rewritten]] = defaultdict(dict)
    for port in sorted(ports, key=lambda port: port.name):
        for unit in port.classes:
            units = files[output_path(unit.kind, unit.upstream.module)]
            held = units.get(unit.upstream.reference)
            units[unit.upstream.reference] = unit if held is None else _one(held, unit)
    return {path: render(list(units.values())) for path, units in sorted(files.items())}


def contradiction(port: Port, others: Iterable[Port]) -> Refusal | None:
    """Why `port` cannot stand in one folder with `others`, None where it can."""
    try:
        shared = [o for o in others if o.paths() & port.paths()]
        units: dict[str, Rewritten] = {}
        for unit in (unit for each in (*shared, port) for unit in each.classes):
            held = units.get(unit.upstream.reference)
            units[unit.upstream.reference] = unit if held is None else _one(held, unit)
    except Refusal as refusal:
        return refusal
    return None


def _one(held: Rewritten, unit: Rewritten) -> Rewritten:
    """One unit for two ports of the same class."""
    if held.facts is None or unit.facts is None or held.facts == unit.facts:
        return held
    owner = held.upstream
    facts = merged(held.facts, unit.facts, owner.class_name)
    for done in (held, unit):
        # Equality of mappings is blind to their order, and the text follows it.
        if repr(facts) == repr(done.facts):
            return done
    return _transformer(owner, facts)


def lock_entry(port: Port, outputs: Mapping[str, str]) -> dict[str, Any]:
    """What the lock keeps of a port; `outputs` are texts by path."""
    pipeline_unit = port.classes[0]
    path = output_path("pipeline", port.upstream.module)
    return {
        "class": port.upstream.reference,
        "generated": {
            "file": path,
            "class": wrapper_name("pipeline", port.upstream.class_name),
        },
        "diffusers": port.upstream.version,
        "porter": __version__,
        "upstream": upstream_symbols(port),
        "rules": {u.upstream.reference: dict(u.rewrite.counts) for u in port.classes},
        "changed_lines": {u.upstream.reference: changed_lines(u) for u in port.classes},
        "outputs": {p: source.sha256(outputs[p]) for p in sorted(port.paths())},
        "facts": to_json(port.facts),
        "refused_modes": dict(pipeline_unit.refused_modes),
        "override": None,
    }


def upstream_symbols(port: Port) -> dict[str, str]:
    """sha256 of every upstream definition that the port's text uses, by full name."""
    symbols: dict[str, str] = {}
    for unit in port.classes:
        for name in unit.upstream_names():
            found = source.symbol(unit.upstream.module.name, name)
            if found is not None:
                symbols[found[0]] = source.sha256(found[1])
    return symbols


def port_again(name: str, entry: Mapping[str, Any]) -> Port:
    """The port of a lock's entry from the installed source.

    Nothing is measured, unless another version of porter wrote the facts.
    """
    try:
        facts = facts_from_json(entry["facts"])
    except (KeyError, TypeError, ValueError):
        facts = None
    return make_port(name, facts)


def _port_name(upstream: Upstream) -> str:
    inside = upstream.module.name.split(".")[0] == LIBRARY
    return upstream.class_name if inside else upstream.reference


def _measure(upstream: Upstream) -> PipelineFacts:
    # The only place that imports upstream, and torch with it: it runs the model.
    from porter.probe import probe_pipeline

    module = importlib.import_module(upstream.module.name)
    for library in (LIBRARY, "transformers"):
        importlib.import_module(f"{library}.utils.logging").disable_progress_bar()
    return probe_pipeline(
        getattr(module, upstream.class_name),
        lambda cls: source.load(f"{cls.__module__}:{cls.__qualname__}").module,
    )


def _transformers(upstream: Upstream, facts: PipelineFacts) -> Iterator[Rewritten]:
    annotations = source.denoiser_parameters(source.class_node(upstream))
    found_facts: dict[str, TransformerFacts] = {}
    for name, measured in sorted(facts.transformers.items()):
        annotation = annotations.get(name, "").split("|")[0].strip()
        found = source.symbol(upstream.module.name, annotation)
        if found is None:
            raise PorterError(
                f"the class of {name} is annotated {annotation or 'nowhere'}",
                expected="a transformer class that the module imports",
                where=upstream.module.file,
            )
        held = found_facts.get(found[0], measured)
        found_facts[found[0]] = merged(held, measured, annotation)
    for symbol, measured in found_facts.items():
        yield _transformer(source.load(":".join(symbol.rsplit(".", 1))), measured)


def _transformer(owner: Upstream, facts: TransformerFacts) -> Rewritten:
    forward = Forward(owner.module, owner.class_name, facts)
    rules = transformer.WHOLE_RULES if facts.whole else transformer.RULES
    return rewrite("transformer", owner, rules, forward, forward.method)


def _processors(facts: PipelineFacts) -> Iterator[Rewritten]:
    names = {n for found in facts.transformers.values() for n in found.processors}
    mixing = [found.mixing for found in facts.transformers.values()]
    sums = {name: texts for found in mixing for name, texts in found.token_sums.items()}
    scales = {name for found in mixing for name in found.scales}
    selecting = {name for found in mixing for name in found.selecting}
    padded = {name for found in mixing for name in found.padded}
    for name in sorted(names):
        owner = source.load(":".join(name.rsplit(".", 1)))
        processor = Processor(
            owner.module,
            owner.class_name,
            sums.get(name, ()),
            name in scales,
            name in selecting,
            name in padded,
        )
        yield rewrite("attention", owner, attention.RULES, processor, processor.method)


def rewrite(
    kind: str,
    upstream: Upstream,
    rules: Sequence[type[Rule[Any]]],
    facts: Any,
    method: cst.FunctionDef,
) -> Rewritten:
    """One method of one class after a package of rules."""
    result = apply_rules(
        upstream.module,
        [rule() for rule in rules],
        facts,
        subject=upstream.class_name,
        within=[method],
    )
    refused = facts.refused_modes if isinstance(facts, PipelineContext) else {}
    return Rewritten(
        kind=kind,
        upstream=upstream,
        rewrite=result,
        original=result.original(method),
        text=result.text(method),
        method_start=upstream.module.line(
            method.decorators[0] if method.decorators else method
        ),
        refused_modes=refused,
        facts=facts.facts if isinstance(facts, Forward) else None,
    )
