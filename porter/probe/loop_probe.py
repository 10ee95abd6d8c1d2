"""Solves the facts of one block loop from what several runs of its model saw."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from porter.analysis.block_loops import BlockLoop
from porter.analysis.facts import LoopFacts, TokenAxis
from porter.errors import Refusal
from porter.names import qualified_name
from porter.parsed import ParsedModule
from porter.probe.axes import AxisSolver
from porter.probe.latents import LatentProbe, place_in_runs
from porter.probe.loop_runs import LoopRun
from porter.probe.provenance import KeyOrigins, Leaf, Rows, runs_of

Variant = tuple[int, int]
Trace = Callable[[Mapping[Leaf, int], set[str]], KeyOrigins]
"""The origins of a loop's keys, from token dimensions and carried names."""
BATCHED: tuple[Variant, ...] = ((0, 0), (1, 0), (0, 1))
"""(image size, text) of the calls with two samples, as indices."""


@dataclass(frozen=True)
class Measured:
    """What was found at one loop.

    Attributes:
        facts: the loop's facts.
        attention: streams of the keys of each attention module, by path.
        queries: those of the queries where they are others.
        processors: qualified names of the processor classes.
        leaves: the tensor and the token dimension of each stream that is cut.
    """

    facts: LoopFacts
    attention: dict[str, tuple[str, ...]]
    queries: dict[str, tuple[str, ...]]
    processors: tuple[str, ...]
    leaves: dict[str, tuple[Leaf, int]]

    @property
    def keys(self) -> dict[str, tuple[str, ...]]:
        """Streams of the keys by path inside a block."""
        return {path.split(".", 2)[2]: names for path, names in self.attention.items()}

    def lengths(self, run: LoopRun) -> dict[str, int]:
        """Lengths of the streams that are cut, in one run."""
        return {
            name: run.shapes[variable][path][dim]
            for name, ((variable, path), dim) in self.leaves.items()
        }


class LoopProbe:
    """Solves one loop's facts from what several runs saw."""

    def __init__(
        self,
        source: ParsedModule,
        loop: BlockLoop,
        runs: Sequence[LoopRun],
        variants: Sequence[Variant],
        tokens: Sequence[LatentProbe],
        padded: Sequence[LoopRun],
        trace: Trace,
    ) -> None:
        self._source = source
        self._loop = loop
        self._runs = runs
        self._sizes = [size for size, _ in variants]
        self._texts = [text for _, text in variants]
        self._tokens = tokens
        self._padded = padded
        self._trace = trace
        self._where = source.where(loop.node)

    def measure(self) -> Measured | None:
        """The loop's facts; None for a loop that carries no image tokens."""
        axes = {leaf: axis for leaf, axis in self._varying() if axis is not None}
        image = [
            name
            for name in self._loop.results
            if (name, "") in axes and self._with_image(name, axes)
        ]
        if not image:
            return None
        axes |= self._fixed_streams(axes, axes[image[0], ""])
        carried = {name for name in self._loop.carried if (name, "") in axes}
        origins = self._trace(axes, carried)
        keys = self._streams_by_path(origins.keys, "keys")
        streams = dict.fromkeys(n for n in self._loop.results if (n, "") in axes)
        for names in keys.values():
            if any(name in streams for name in names):
                streams.update(dict.fromkeys(names))
        for path, names_apart in origins.contexts.items():
            if names_apart & streams.keys():
                raise self._no_streams("keys", path)
        leaves = {name: self._leaf(name, origins.dims) for name in streams}
        whole = tuple(name for name in streams if leaves[name] not in axes)
        lengths = {
            name: self._lengths(leaf, origins.dims[leaf])
            for name, leaf in leaves.items()
            if name not in whole
        }
        order = self._joint_order(keys, streams)
        solver = self._solver(lengths, order, "shapes")
        values = {
            name: found
            for name in dict.fromkeys((*self._loop.carried, *self._loop.reads))
            if name not in whole and (found := solver.axes_of(name))
        }
        values |= self._padded_values(
            {n: (leaves[n], origins.dims[leaves[n]]) for n in lengths},
            tuple(n for n in order if n in lengths),
        )
        counts = self._counts(solver)
        travels = tuple(
            name
            for name in values
            if name not in self._loop.carried
            and self._tokens[0].moves(self._loop.blocks, name)
        )
        latents, context, rows = self._latents(image, lengths, values, travels)
        sharded = {path: n for path, n in keys.items() if set(n) & set(streams)}
        return Measured(
            LoopFacts(
                blocks=self._loop.blocks,
                lengths={
                    name: (_expression(leaf), origins.dims[leaf])
                    for name, leaf in leaves.items()
                },
                latents=latents,
                context=context,
                rows=rows,
                ndim=self._tokens[0].ndim,
                travels=travels,
                fresh=self._fresh(values),
                values=values,
                whole=whole,
                filled=tuple(self._filled(values)),
                after=self._after(values, self._solver(lengths, order, "inside")),
                counts=counts,
            ),
            {f"{self._loop.blocks}.*.{path}": n for path, n in sharded.items()},
            self._queries(sharded, origins),
            self._processors(sharded, origins),
            {n: (leaves[n], origins.dims[leaves[n]]) for n in order if n in lengths},
        )

    def _padded_values(
        self, streams: Mapping[str, tuple[Leaf, int]], order: tuple[str, ...]
    ) -> dict[str, tuple[TokenAxis, ...]]:
        """Axes of the values that only calls with texts of different lengths have.

        Args:
            streams: the tensor and the token dimension of each stream.
            order: the streams in the order of joint sequences.
        """
        if not self._padded:
            return {}
        shapes = [run.shapes for run in self._padded]
        lengths = {
            name: tuple(run[variable][path][dim] for run in shapes)
            for name, ((variable, path), dim) in streams.items()
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

    def _solver(
        self, lengths: Mapping[str, tuple[int, ...]], order: tuple[str, ...], when: str
    ) -> AxisSolver:
        """Solves axes of what the runs saw before the loop or inside."""
        shapes = [getattr(run, when) for run in self._runs]
        order = tuple(name for name in order if name in lengths)
        return AxisSolver(shapes, self._texts, lengths, order, self._where)

    def _fixed_streams(self, axes: Mapping[Leaf, int], dim: int) -> dict[Leaf, int]:
        """Carried streams of a length that never changes: they lie like the image stream.

        The origins of the keys confirm it: each row must be one key, in order.
        """
        shapes = self._runs[0].shapes
        return {
            (name, ""): dim
            for name in self._loop.results
            if name in self._variables()
            and (name, "") not in axes
            and len(shapes[name].get("", ())) > dim
        }

    def _variables(self) -> list[str]:
        """Names that hold tensors in every run."""
        names = dict.fromkeys((*self._loop.carried, *self._loop.reads))
        return [n for n in names if all(run.shapes.get(n) for run in self._runs)]

    def _varying(self) -> Iterator[tuple[Leaf, int | None]]:
        """The first dimension of each tensor that changes between the runs."""
        for name in self._variables():
            for path in self._runs[0].shapes[name]:
                shapes = [run.shapes[name].get(path) for run in self._runs]
                known = [shape for shape in shapes if shape is not None]
                if len(known) == len(shapes) and len(set(map(len, known))) == 1:
                    changes = (
                        len(set(extents)) > 1 for extents in zip(*known, strict=True)
                    )
                    yield (name, path), next(
                        (d for d, c in enumerate(changes) if c), None
                    )

    def _leaf(self, name: str, dims: Mapping[Leaf, int]) -> Leaf:
        """The tensor of a variable that holds its tokens: itself, or its first item."""
        return next(leaf for leaf in dims if leaf[0] == name)

    def _lengths(self, leaf: Leaf, dim: int) -> tuple[int, ...]:
        return tuple(run.shapes[leaf[0]][leaf[1]][dim] for run in self._runs)

    def _with_image(self, name: str, axes: Mapping[Leaf, int]) -> bool:
        """True when the tokens change between the first two runs: another image size."""
        lengths = self._lengths((name, ""), axes[name, ""])
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
        values: Mapping[str, tuple[TokenAxis, ...]],
        travels: Sequence[str],
    ) -> tuple[str | None, str | None, tuple[tuple[int, int], ...]]:
        """The one stream that holds the latents' tokens, where others stand in it, and
        the latents' dimensions that count tokens, in the order of the stream.

        The latents may reach its tokens inside the blocks alone, from a value that holds
        them in the same order.
        """
        alone = [name for name in image if not self._with_text(lengths[name])]
        streams = alone if len(alone) == 1 else image
        if len(streams) != 1:
            return None, None, ()
        (stream,) = streams
        for name in (stream, *travels):
            axis, *more = values[name]
            if more or axis.streams != (stream,):
                continue
            where = (self._loop.blocks, name, axis.dim)
            found = place_in_runs(self._tokens, *where, lengths[stream])
            if found is not None:
                return stream, found or None, self._tokens[0].rows(*where)
        return None, None, ()

    def _fresh(self, values: Mapping[str, tuple[TokenAxis, ...]]) -> dict[str, str]:
        """What calls assign, nothing binds before and the body reads: the stream alike."""

        def shapes(name: str) -> list[tuple[int, ...] | None]:
            return [run.inside.get(name, {}).get("") for run in self._runs]

        streams = [name for name in self._loop.results if name in values]
        return {
            name: stream
            for name in self._loop.used
            if not any(run.shapes.get(name) for run in self._runs)
            for stream in streams
            if None not in shapes(name) and shapes(name) == shapes(stream)
        }

    def _streams_by_path(
        self, rows_by_path: Mapping[str, Rows], what: str
    ) -> dict[str, tuple[str, ...]]:
        """Streams of the keys of each attention module of the block, in order."""
        found: dict[str, tuple[str, ...]] = {}
        for path, rows in rows_by_path.items():
            runs = runs_of(rows) if rows is not None else None
            if runs is None:
                raise self._no_streams(what, path)
            found[_starred(path)] = tuple(name for (name, _), _ in runs)
        return found

    def _no_streams(self, what: str, path: str) -> Refusal:
        return Refusal(
            f"{what} of attention {self._loop.blocks}.*.{path} that are no whole streams "
            "in order",
            expected="concatenated token streams",
            where=self._where,
        )

    def _queries(
        self, sharded: Mapping[str, tuple[str, ...]], origins: KeyOrigins
    ) -> dict[str, tuple[str, ...]]:
        """Streams of the queries where they are not those of the keys."""
        shown = [path for path in origins.queries if _starred(path) in sharded]
        rows = {
            path: origins.queries[path]
            for path in shown
            if (keys := origins.keys[path]) is None
            or len(origins.queries[path] or keys) != len(keys)
        }
        return {
            f"{self._loop.blocks}.*.{path}": names
            for path, names in self._streams_by_path(rows, "queries").items()
        }

    def _filled(self, values: Mapping[str, tuple[TokenAxis, ...]]) -> Iterator[str]:
        """Lists without tensors before the loop that hold some inside."""
        for name in dict.fromkeys((*self._loop.carried, *self._loop.filled)):
            seen = any(run.inside.get(name) for run in self._runs)
            if name in self._loop.results and name not in self._loop.alive:
                continue  # every iteration makes it anew
            if seen and name not in values and not self._runs[0].shapes.get(name):
                yield name

    def _after(
        self, values: Mapping[str, tuple[TokenAxis, ...]], solver: AxisSolver
    ) -> dict[str, tuple[TokenAxis, ...]]:
        """Token axes of what the body makes and code after the loop reads."""
        grown = {name for name in self._filled(values) if name in self._loop.carried}
        return {
            name: axes
            for name in sorted({*self._loop.later, *grown} - set(values))
            if (axes := solver.axes_of(name))
        }

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

    def _counts(self, solver: AxisSolver) -> dict[str, tuple[str, ...]]:
        """Integers of the loop's body that count the tokens of streams."""
        found = {}
        for name in self._runs[0].integers:
            numbers = [run.integers.get(name) for run in self._runs]
            if len(set(numbers)) == 1 or name in self._loop.arguments:
                # What a block makes of it is measured on the block.
                continue
            streams = solver.counted(numbers)
            if streams is None:
                raise Refusal(
                    f"integer {name} that changes with the image or the text reaches the "
                    "blocks",
                    expected="no global sizes in a block",
                    where=self._where,
                )
            found[name] = streams
        return found

    def _processors(
        self, sharded: Mapping[str, tuple[str, ...]], origins: KeyOrigins
    ) -> tuple[str, ...]:
        names = []
        for path, module in origins.modules.items():
            if _starred(path) in sharded:
                processor = getattr(module, "processor", None)
                if processor is None:
                    raise Refusal(
                        f"attention {type(module).__name__} without a processor",
                        expected="one that can be replaced",
                        where=self._where,
                    )
                names.append(qualified_name(type(processor)))
        return tuple(sorted(set(names)))


def _starred(path: str) -> str:
    """A module's path with `*` for indices."""
    return re.sub(r"\.\d+\.", ".*.", path)


def _expression(leaf: Leaf) -> str:
    """How code before the loop names a tensor of a variable."""
    name, path = leaf
    return name + "".join(
        f"[{key}]" if key.isdigit() else f"[{key!r}]" for key in path.split(".") if key
    )
