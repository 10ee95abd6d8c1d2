"""What the rules are told about a model: literals that end up in the generated code.

Every fact is measured by `porter.probe` on the shrunken model or read from its source by
`porter.analysis`; none is derived from a class's name.  All facts turn into plain JSON, so
that the lock can keep them beside the hashes of the source they were taken from.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from porter.analysis.mixing import MixingFacts, mixing_from_json

ITEMS = "items"
"""Stands for an axis where guidance doubles the items of a list instead of a dimension."""

#: The axis that guidance doubles of each argument, or ITEMS, by path.
Axes = dict[str, int | str]


@dataclasses.dataclass(frozen=True)
class TokenAxis:
    """A dimension of a value that counts tokens.

    Attributes:
        dim: the dimension, the same for every tensor in the value (or in the item).
        streams: whose tokens it counts, in the order in which they lie.
        item: index into the value where its items hold different tokens, else None.
        keys: the dimension of the keys in a mask over pairs of tokens, else None; `dim` is
            then that of the queries.
        ndim: number of dimensions of the tensors that hold tokens.
        optional: some calls give the value once for all tokens, told by its size.
        repeated: the dimension holds the tokens once for each sample.
    """

    dim: int
    streams: tuple[str, ...]
    item: int | None = None
    keys: int | None = None
    ndim: int = 0
    optional: bool = False
    repeated: bool = False


@dataclasses.dataclass(frozen=True)
class Tail:
    """What comes after the last loop and maps each token of the latents' stream by itself.

    Attributes:
        stream: the stream.
        statements: the text of those statements that touch it, in order.
        result: the one name that then holds its tokens and is read afterwards.
    """

    stream: str
    statements: tuple[str, ...]
    result: str


@dataclasses.dataclass(frozen=True)
class LoopFacts:
    """One loop over transformer blocks.

    Attributes:
        blocks: attribute name of the block list.
        lengths: for each stream that is sharded in this loop, the variable and dimension
            that hold its tokens before the loop.
        latents: the stream whose tokens follow the latents, if one stream does.
        context: where other tokens stand in that stream: "before" or "after" those of the
            latents, or None where it holds nothing else.
        rows: the dimensions of the transformer's first tensor that count the latents'
            tokens, each with a token's extent, the one that the stream runs over last first;
            empty where patches cannot cut them.
        ndim: number of dimensions of that tensor.
        other_rows: `rows` where that tensor has another number of dimensions, by it: an
            image and a video of one model, say.
        values: token axes of every variable read in the loop that counts sharded tokens,
            the carried streams first: one axis, or one for each item of a tuple.
        whole: streams of keys that stay whole on every rank: their length did not change in
            any run, so nothing tells their tokens in other values.
        filled: lists of token tensors that the body fills, empty before the loop.
        after: token axes of what the body makes and code after the loop reads.
        counts: integers of the body that count the tokens of streams.
        travels: values that follow the latents' values and that the loop reads alone: the
            stages hand them over with the carried streams.
        fresh: what the block calls assign and nothing binds before the loop, each with the
            carried stream that has its shape.
        classes: names of the blocks' classes; others were not measured.
        companions: lists that the loop runs over in step, whose blocks leave their tokens
            apart, each with the names of its blocks' classes.
        tail: of the last loop, what runs on this rank's tokens behind it; None where they
            are gathered at once.
    """

    blocks: str
    lengths: Mapping[str, tuple[str, int]]
    latents: str | None
    context: str | None
    rows: tuple[tuple[int, int], ...]
    values: Mapping[str, tuple[TokenAxis, ...]]
    whole: tuple[str, ...] = ()
    filled: tuple[str, ...] = ()
    after: Mapping[str, tuple[TokenAxis, ...]] = dataclasses.field(default_factory=dict)
    counts: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    classes: tuple[str, ...] = ()
    ndim: int = 0
    other_rows: Mapping[int, tuple[tuple[int, int], ...]] = dataclasses.field(
        default_factory=dict
    )
    travels: tuple[str, ...] = ()
    fresh: Mapping[str, str] = dataclasses.field(default_factory=dict)
    companions: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    tail: Tail | None = None


@dataclasses.dataclass(frozen=True)
class TransformerFacts:
    """A denoising transformer.

    Attributes:
        loops: the regions, in the order in which `forward` runs them.
        attention: for each attention module that works on sharded tokens, by path with
            `*` for indices, the streams of its keys in order.
        processors: qualified names of the processor classes of these modules.
        layers: qualified names of layer classes outside the blocks that mix tokens.
        queries: the streams of the queries, by path, where they are not those of the keys.
        mixing: how the blocks mix tokens besides the kernels of their attention.
        whole: why every rank runs the whole of it, `file:line: construct`; there are no
            loops then.  Empty where its tokens and blocks can be split.
        batch_processors: those of `processors` that a pipeline sets for some calls alone, whose
            batch they may look at as a whole.
    """

    loops: tuple[LoopFacts, ...]
    attention: Mapping[str, tuple[str, ...]]
    processors: tuple[str, ...]
    layers: tuple[str, ...]
    queries: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    mixing: MixingFacts = dataclasses.field(default_factory=MixingFacts)
    whole: str = ""
    batch_processors: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class PipelineFacts:
    """A pipeline and its denoising transformers.

    Attributes:
        cfg_style: how the loop calls the transformer: "batched", "carried" (doubled, and so
            are the latents), "padded" (the halves cannot be computed alone), "sequential",
            "single" (alike with guidance and without) or "none" (not to be told).
        cfg_axes: for a batched call, the axis that guidance doubles of each argument, or
            ITEMS for a list of one item a picture.
        transformers: facts by component name.
        helpers: other models that a step calls on the latents (a ControlNet).
        cfg_helper_axes: as `cfg_axes`, by helper, where each rank runs its branch alone; any
            other helper runs whole on every rank.
        no_stages: why a run shows that it admits no stages, or "".
    """

    cfg_style: str
    cfg_axes: Mapping[str, int | str]
    transformers: Mapping[str, TransformerFacts]
    helpers: tuple[str, ...] = ()
    cfg_helper_axes: Mapping[str, Mapping[str, int | str]] = dataclasses.field(
        default_factory=dict
    )
    no_stages: str = ""


def to_json(facts: Any) -> Any:
    """Plain JSON of facts; `facts_from_json` is its inverse."""
    return dataclasses.asdict(facts)


def facts_from_json(data: Mapping[str, Any]) -> PipelineFacts:
    """Pipeline facts from their JSON."""
    return PipelineFacts(
        cfg_style=data["cfg_style"],
        cfg_axes=dict(data["cfg_axes"]),
        transformers={
            name: _transformer(item) for name, item in data["transformers"].items()
        },
        helpers=tuple(data.get("helpers", ())),
        cfg_helper_axes={
            name: dict(axes) for name, axes in data.get("cfg_helper_axes", {}).items()
        },
        no_stages=data.get("no_stages", ""),
    )


def axes_literal(axes: Mapping[str, int | str]) -> str:
    """Doubled axes as the text of a dict."""
    items = (f"{json.dumps(k)}: {json.dumps(axis)}" for k, axis in sorted(axes.items()))
    return f"{{{', '.join(items)}}}"


def _transformer(data: Mapping[str, Any]) -> TransformerFacts:
    return TransformerFacts(
        loops=tuple(_loop(loop) for loop in data["loops"]),
        attention=_tuples(data["attention"]),
        processors=tuple(data["processors"]),
        layers=tuple(data["layers"]),
        queries=_tuples(data.get("queries", {})),
        mixing=mixing_from_json(data.get("mixing", {})),
        whole=data.get("whole", ""),
        batch_processors=tuple(data.get("batch_processors", ())),
    )


def _loop(data: Mapping[str, Any]) -> LoopFacts:
    return LoopFacts(
        blocks=data["blocks"],
        lengths={
            name: (variable, dim) for name, (variable, dim) in data["lengths"].items()
        },
        latents=data["latents"],
        context=data["context"],
        rows=_rows(data["rows"]),
        values=_axes(data["values"]),
        whole=tuple(data.get("whole", ())),
        filled=tuple(data.get("filled", ())),
        after=_axes(data.get("after", {})),
        counts=_tuples(data.get("counts", {})),
        classes=tuple(data.get("classes", ())),
        ndim=data.get("ndim", 0),
        other_rows={
            int(ndim): _rows(rows) for ndim, rows in data.get("other_rows", {}).items()
        },
        travels=tuple(data.get("travels", ())),
        fresh=dict(data.get("fresh", {})),
        companions=_tuples(data.get("companions", {})),
        tail=_tail(data.get("tail")),
    )


def _tail(data: Mapping[str, Any] | None) -> Tail | None:
    if data is None:
        return None
    return Tail(data["stream"], tuple(data["statements"]), data["result"])


def _rows(data: Any) -> tuple[tuple[int, int], ...]:
    return tuple((dim, extent) for dim, extent in data)


def _axes(data: Mapping[str, Any]) -> dict[str, tuple[TokenAxis, ...]]:
    return {
        name: tuple(
            TokenAxis(
                axis["dim"],
                tuple(axis["streams"]),
                axis["item"],
                axis["keys"],
                axis["ndim"],
                axis["optional"],
                axis.get("repeated", False),
            )
            for axis in axes
        )
        for name, axes in data.items()
    }


def _tuples(data: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(items) for name, items in data.items()}
