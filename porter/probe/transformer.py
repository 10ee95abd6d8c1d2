"""Measures the token axes and the attention of one transformer."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from porter.analysis.block_loops import BlockLoop, find_block_loops, find_method
from porter.analysis.facts import LoopFacts, TokenAxis, TransformerFacts
from porter.errors import Refusal
from porter.parsed import ParsedModule
from porter.probe.axes import AxisSolver
from porter.probe.capture import TransformerCall
from porter.probe.instrument import instrumented_forward
from porter.probe.latents import LatentProbe
from porter.probe.leaves import leaf_shapes
from porter.probe.provenance import KeyOrigins, runs_of

Variant = tuple[int, int]
BATCHED: tuple[Variant, ...] = ((0, 0), (1, 0), (0, 1))
"""(image size, text) of the calls with two samples, as indices."""


@dataclass
class _LoopRun:
    """What one run saw at one loop."""

    shapes: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    integers: dict[str, int] = field(default_factory=dict)
    block: nn.Module | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


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
    runs = [_run(model, source, forward, loops, call) for call in calls]
    batched_runs = [_run(model, source, forward, loops, call) for call in batched]
    facts: list[LoopFacts] = []
    attention: dict[str, tuple[str, ...]] = {}
    processors: dict[str, None] = {}
    tokens = LatentProbe(model, source, forward, loops, calls[0])
    for loop in loops:
        seen = [run[loop.blocks] for run in runs if loop.blocks in run]
        if len(seen) != len(calls):
            continue
        padded = [run[loop.blocks] for run in batched_runs if loop.blocks in run]
        measured = _LoopProbe(source, loop, seen, variants, tokens, padded).measure()
        if measured is not None:
            facts.append(measured.facts)
            attention.update(measured.attention)
            processors.update(dict.fromkeys(measured.processors))
    if not facts:
        raise Refusal(
            f"no loop over transformer blocks in {type(model).__name__}.forward",
            expected="a loop that carries the image tokens",
            where=source.where(forward),
        )
    lists = {loop.blocks for loop in loops}
    return TransformerFacts(
        tuple(facts), attention, tuple(sorted(processors)), _layers(model, lists)
    )


def _run(
    model: nn.Module,
    source: ParsedModule,
    forward: Any,
    loops: tuple[BlockLoop, ...],
    call: TransformerCall,
) -> dict[str, _LoopRun]:
    """One instrumented forward; what each loop saw, by block list."""
    seen: dict[str, _LoopRun] = {}
    reads = {loop.blocks: set(loop.reads) | set(loop.carried) for loop in loops}

    def report(blocks: str, names: dict[str, Any]) -> None:
        run = seen.setdefault(blocks, _LoopRun())
        for name in reads[blocks] & set(names):
            run.shapes[name] = leaf_shapes(names[name])
            if type(names[name]) is int:
                run.integers[name] = names[name]

    def first_block(blocks: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            run = seen.setdefault(blocks, _LoopRun())
            if run.block is None:
                run.block, run.args, run.kwargs = module, args, dict(kwargs)

        return hook

    handles = [
        blocks_of[0].register_forward_pre_hook(first_block(name), with_kwargs=True)
        for name in reads
        if (blocks_of := getattr(model, name, None))
    ]
    function = instrumented_forward(source, forward, loops, model, report)
    arguments = {
        name: dict(value) if isinstance(value, dict) else value
        for name, value in call.arguments.items()
    }
    try:
        with torch.no_grad():
            function(**arguments)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@dataclass(frozen=True)
class _Measured:
    facts: LoopFacts
    attention: dict[str, tuple[str, ...]]
    processors: tuple[str, ...]


class _LoopProbe:
    """Solves one loop's facts from what several runs saw."""

    def __init__(
        self,
        source: ParsedModule,
        loop: BlockLoop,
        runs: Sequence[_LoopRun],
        variants: Sequence[Variant],
        tokens: LatentProbe,
        padded: Sequence[_LoopRun],
    ) -> None:
        self._source = source
        self._loop = loop
        self._runs = runs
        self._sizes = [size for size, _ in variants]
        self._texts = [text for _, text in variants]
        self._tokens = tokens
        self._padded = padded
        self._where = source.where(loop.node)

    def measure(self) -> _Measured | None:
        """The loop's facts; None for a loop that carries no image tokens."""
        axes = {
            name: axis
            for name in self._variables()
            if (axis := self._varying(name, "")) is not None
        }
        image = [
            n for n in self._loop.carried if n in axes and self._with_image(n, axes)
        ]
        if not image:
            return None
        axes |= self._fixed_streams(axes, axes[image[0]])
        origins = self._key_origins(axes)
        streams = dict.fromkeys(name for name in self._loop.carried if name in axes)
        for keys in origins.values():
            if any(name in streams for name in keys):
                streams.update(dict.fromkeys(keys))
        lengths = {name: self._lengths(name, axes[name]) for name in streams}
        order = self._joint_order(origins, streams)
        solver = AxisSolver(
            [run.shapes for run in self._runs], self._texts, lengths, order, self._where
        )
        values = {
            name: found
            for name in dict.fromkeys((*self._loop.carried, *self._loop.reads))
            if (found := solver.axes_of(name))
        }
        values |= self._padded_values({name: axes[name] for name in streams}, order)
        self._check_integers()
        latents, context = self._latents(image, lengths, axes)
        rows = self._rows(latents, axes)
        sharded = {
            path: keys for path, keys in origins.items() if set(keys) & set(streams)
        }
        return _Measured(
            LoopFacts(
                blocks=self._loop.blocks,
                lengths={name: (name, axes[name]) for name in streams},
                latents=latents,
                context=context,
                rows=rows,
                values=values,
            ),
            {f"{self._loop.blocks}.*.{path}": keys for path, keys in sharded.items()},
            self._processors(sharded),
        )

    def _padded_values(
        self, streams: Mapping[str, int], order: tuple[str, ...]
    ) -> dict[str, tuple[TokenAxis, ...]]:
        """Axes of the values that only calls with texts of different lengths have.

        Args:
            streams: the token dimension of each stream.
            order: the streams in the order of joint sequences.
        """
        if not self._padded:
            return {}
        shapes = [run.shapes for run in self._padded]
        lengths = {
            name: tuple(run[name][""][dim] for run in shapes)
            for name, dim in streams.items()
        }
        texts = [text for _, text in BATCHED]
        solver = AxisSolver(shapes, texts, lengths, order, self._where)
        known = {name for run in self._runs for name in run.shapes if run.shapes[name]}
        names = dict.fromkeys(name for run in shapes for name in run)
        return {
            name: found
            for name in names
            if name not in known and (found := solver.axes_of(name))
        }

    def _fixed_streams(self, axes: Mapping[str, int], dim: int) -> dict[str, int]:
        """Carried streams of a length that never changes: they lie like the image stream.

        The origins of the keys confirm it: each row must be one key, in order.
        """
        shapes = self._runs[0].shapes
        return {
            name: dim
            for name in self._loop.carried
            if name in self._variables()
            and name not in axes
            and len(shapes[name].get("", ())) > dim
        }

    def _variables(self) -> list[str]:
        """Names that hold tensors in every run."""
        names = dict.fromkeys((*self._loop.carried, *self._loop.reads))
        return [n for n in names if all(run.shapes.get(n) for run in self._runs)]

    def _varying(self, name: str, path: str) -> int | None:
        """The first dimension of a bare tensor that changes between the runs."""
        shapes = [run.shapes[name].get(path) for run in self._runs]
        first = shapes[0]
        if first is None or any(s is None or len(s) != len(first) for s in shapes):
            return None
        for dim in range(len(first)):
            if len({shape[dim] for shape in shapes if shape is not None}) > 1:
                return dim
        return None

    def _lengths(self, name: str, dim: int) -> tuple[int, ...]:
        return tuple(run.shapes[name][""][dim] for run in self._runs)

    def _with_image(self, name: str, axes: Mapping[str, int]) -> bool:
        """True when the tokens change between the first two runs: another image size."""
        lengths = self._lengths(name, axes[name])
        return lengths[0] != lengths[1]

    def _with_text(self, lengths: Sequence[int]) -> bool:
        """True when a length changes between runs of the same image size."""
        runs = range(len(lengths))
        return any(
            lengths[i] != lengths[j] and self._sizes[i] == self._sizes[j]
            for i in runs
            for j in runs
        )

    def _latents(
        self,
        image: Sequence[str],
        lengths: Mapping[str, tuple[int, ...]],
        axes: Mapping[str, int],
    ) -> tuple[str | None, str | None]:
        """The one stream that holds the latents' tokens, and where others stand in it."""
        alone = [name for name in image if not self._with_text(lengths[name])]
        streams = alone if len(alone) == 1 else image
        if len(streams) != 1:
            return None, None
        (name,) = streams
        place = self._tokens.place(self._loop.blocks, name, axes[name])
        if place is None or place.length != lengths[name][0]:
            return None, None
        if place.stop - place.start == place.length:
            return name, None
        if place.start > 0 and place.stop < place.length:
            return None, None
        return name, "before" if place.start > 0 else "after"

    def _rows(
        self, latents: str | None, axes: Mapping[str, int]
    ) -> tuple[tuple[int, int], ...]:
        """The latents' dimensions that count tokens, in the order of the stream."""
        if latents is None:
            return ()
        return self._tokens.rows(self._loop.blocks, latents, axes[latents])

    def _parameters(self) -> dict[str, str]:
        """Variable of each parameter of the block that is a plain name."""
        block = self._runs[0].block
        assert block is not None
        names = list(inspect.signature(type(block).forward).parameters)[1:]
        return {
            (names[key] if isinstance(key, int) else key): text
            for key, text in self._loop.arguments
            if text.isidentifier() and (not isinstance(key, int) or key < len(names))
        }

    def _key_origins(self, axes: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
        """Streams of the keys of each attention module of the block, in order."""
        run = self._runs[0]
        assert run.block is not None
        variables = {
            parameter: name
            for parameter, name in self._parameters().items()
            if name in axes
        }
        carried = {p for p, name in variables.items() if name in self._loop.carried}
        self._origins = KeyOrigins(
            run.block,
            run.args,
            run.kwargs,
            {parameter: axes[name] for parameter, name in variables.items()},
            carried,
        ).run()
        found: dict[str, tuple[str, ...]] = {}
        for path, rows in self._origins.keys.items():
            runs = runs_of(rows) if rows is not None else None
            if runs is None:
                raise Refusal(
                    f"keys of attention {self._loop.blocks}.*.{path} that are no whole "
                    "streams in order",
                    expected="concatenated token streams",
                    where=self._where,
                )
            found[re.sub(r"\.\d+\.", ".*.", path)] = tuple(
                variables[parameter] for parameter, _ in runs
            )
        return found

    def _joint_order(
        self, origins: Mapping[str, tuple[str, ...]], streams: Mapping[str, None]
    ) -> tuple[str, ...]:
        """The order of streams in joint sequences."""
        orders = {keys for keys in origins.values() if len(keys) > 1}
        if len(orders) > 1:
            raise Refusal(
                f"joint attentions with keys in {len(orders)} orders",
                expected="one order of the streams in a block",
                where=self._where,
            )
        joint = next(iter(orders), ())
        return joint + tuple(name for name in streams if name not in joint)

    def _check_integers(self) -> None:
        for name, value in self._runs[0].integers.items():
            if any(run.integers.get(name) != value for run in self._runs):
                raise Refusal(
                    f"integer {name} that changes with the image or the text reaches the "
                    "blocks",
                    expected="no global sizes in a block",
                    where=self._where,
                )

    def _processors(self, sharded: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
        names = []
        for path, module in self._origins.modules.items():
            if re.sub(r"\.\d+\.", ".*.", path) in sharded:
                processor = getattr(module, "processor", None)
                if processor is None:
                    raise Refusal(
                        f"attention {type(module).__name__} without a processor",
                        expected="one that can be replaced",
                        where=self._where,
                    )
                names.append(qualified_name(type(processor)))
        return tuple(sorted(set(names)))


def _layers(model: nn.Module, block_lists: set[str]) -> tuple[str, ...]:
    """Classes of convolutions and patch embeddings outside the blocks."""
    found = set()
    for path, module in model.named_modules():
        if path.split(".")[0] not in block_lists and (
            isinstance(module, nn.Conv2d) or type(module).__name__ == "PatchEmbed"
        ):
            found.add(qualified_name(type(module)))
    return tuple(sorted(found))


def qualified_name(cls: type) -> str:
    """`module.Class` of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"
