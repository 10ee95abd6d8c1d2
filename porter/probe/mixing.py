"""How the blocks of one loop mix tokens, and whether ranks must hold whole rows for it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import libcst as cst
import torch
from torch import nn

from porter.analysis.block_loops import BlockLoop
from porter.analysis.facts import LoopFacts, TokenAxis
from porter.analysis.mixing import Kinds, MixingFacts, TokenCut
from porter.errors import Refusal
from porter.names import qualified_name
from porter.parsed import ParsedModule
from porter.probe.capture import TransformerCall
from porter.probe.cuts import Shard, Unlike, cut_of
from porter.probe.leaves import tensor_leaves
from porter.probe.locality import measure_blocks
from porter.probe.loop_runs import run_swapped
from porter.probe.present_tokens import selects_tokens
from porter.probe.rank_run import BlockCall, RankInput, Remedies, Tokens, starred
from porter.probe.sharded_block import bound_arguments

_RANKS = 2
Arguments = Mapping[str, Any]
"""Arguments of a block, by parameter."""
Swap = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Rows:
    """An integer that counts the rows of the image.

    Attributes:
        stream: the stream that holds the image.
        variable: the integer.
        count: its value.
    """

    stream: str
    variable: str
    count: int


class MixingProbe:
    """Finds the remedies of one loop's blocks.

    Args:
        model: the shrunken stock model.
        source: the module that defines its class.
        forward: its forward.
        loop: the loop.
        blocks: the list whose blocks are looked at, the loop's or a companion.
    """

    def __init__(
        self,
        model: nn.Module,
        source: ParsedModule,
        forward: cst.FunctionDef,
        loop: BlockLoop,
        blocks: str,
    ) -> None:
        self._name, self._blocks = blocks, getattr(model, blocks)
        # What the loop's own first block returns to its companions, by call.
        self._leader = None if blocks == loop.blocks else getattr(model, loop.blocks)[0]
        self._led: dict[int, Any] = {}
        self._loop = loop
        self._where = source.where(loop.node)
        self._run: Callable[[TransformerCall, Swap], None] = functools.partial(
            run_swapped, model, source, forward, loop
        )

    def measure(
        self,
        facts: LoopFacts,
        attention: Mapping[str, tuple[str, ...]],
        calls: Sequence[tuple[TransformerCall, Mapping[str, int]]],
        integers: Sequence[Mapping[str, int]],
    ) -> tuple[Remedies, dict[str, str]]:
        """The remedies, and by stream the variable that counts the image's rows.

        A block that is told the height and width of the image stands any number of whole
        rows when it is told its own height; which of the integers that is, is tried.

        Args:
            facts: the loop's.
            attention: streams of the keys by path inside a block.
            calls: calls of the model, each with the lengths of the loop's streams.
            integers: the integers that the loop reads, in every run.

        Raises:
            Refusal: a block mixes tokens in a way that has no remedy.
        """
        samples = [(call, lengths, self._calls(call)) for call, lengths in calls]
        refusal: Refusal | None = None
        rows_found = self._row_counts(facts, calls[0][1], integers)
        kinds_found = self._kinds(samples[0][2][0], calls[0][1])
        for rows, kinds in (
            (None, {}),
            *((rows, {}) for rows in rows_found),
            *((None, kinds) for kinds in kinds_found),
        ):
            remedies = Remedies(kinds=kinds)
            try:
                for call, lengths, blocks in samples:
                    ranks = self._ranks(call, blocks[0], lengths, facts, rows, kinds)
                    tokens = Tokens(ranks, attention, facts.whole, self._where)
                    measure_blocks(blocks, tokens, remedies)
            except Refusal as error:
                refusal = refusal or error
            else:
                remedies.selecting |= {
                    type(module.processor)
                    for block in self._blocks
                    for module in block.modules()
                    if selects_tokens(module)
                }
                return remedies, {rows.stream: rows.variable} if rows else {}
        assert refusal is not None
        raise refusal

    def _calls(self, call: TransformerCall) -> list[BlockCall]:
        """All blocks with their arguments, as the model calls them."""
        calls: list[BlockCall] = []

        def note(block: nn.Module, args: Any, kwargs: Any) -> None:
            calls.append(BlockCall(block, bound_arguments(block, args, kwargs)))

        def keep(block: nn.Module, args: Any, output: Any) -> None:
            self._led[id(call)] = output

        handles = [
            block.register_forward_pre_hook(note, with_kwargs=True)
            for block in self._blocks
        ]
        if self._leader is not None:
            handles.append(self._leader.register_forward_hook(keep))
        try:
            with torch.no_grad():
                self._run(call, lambda name, value: value)
        finally:
            for handle in handles:
                handle.remove()
        return calls

    def _ranks(
        self,
        call: TransformerCall,
        first: BlockCall,
        lengths: Mapping[str, int],
        facts: LoopFacts,
        rows: Rows | None,
        kinds: Mapping[str, Kinds],
    ) -> tuple[RankInput, ...]:
        """What each rank holds, and what the first block is then given."""
        found = []
        parts, lengths = _segments(lengths, kinds, first.arguments)
        grains = {rows.stream: lengths[rows.stream] // rows.count} if rows else {}
        for rank in range(_RANKS):
            held = {}
            for name, length in lengths.items():
                grain = grains.get(name, 1)
                half = (length // grain + 1) // 2 * grain
                held[name] = (0, half) if rank == 0 else (half, length)
            shard = Shard(held, lengths, grains)
            arguments = self._first_arguments(call, facts, shard, rows, parts)
            for stream, kind in kinds.items():
                start, stop = held[parts[stream][kind.counted]]
                arguments = {**arguments, kind.parameter: stop - start}
            found.append(_rank_input(shard, first.arguments, arguments))
        return tuple(found)

    def _first_arguments(
        self,
        call: TransformerCall,
        facts: LoopFacts,
        shard: Shard,
        rows: Rows | None,
        parts: Mapping[str, tuple[str, ...]],
    ) -> Arguments:
        """What the loop hands to its first block when its variables are a rank's."""

        def swap(name: str, value: Any) -> Any:
            if rows is not None and name == rows.variable:
                start, stop = shard.rows[rows.stream]
                return (stop - start) // shard.grains[rows.stream]
            if name in facts.counts:
                return sum(
                    stop - start
                    for stream in facts.counts[name]
                    for start, stop in map(shard.rows.__getitem__, parts[stream])
                )
            axes = (
                replace(axis, streams=sum(map(parts.__getitem__, axis.streams), ()))
                for axis in facts.values.get(name, ())
            )
            return _local(value, tuple(axes), shard)

        def stop(block: nn.Module, args: Any, kwargs: Any) -> None:
            raise _FirstBlock(bound_arguments(block, args, kwargs))

        def led(block: nn.Module, args: Any, output: Any) -> Any:
            # Its own attention heard the rank's tokens alone.
            return _part_like(self._led[id(call)], output, shard)

        handles = [self._blocks[0].register_forward_pre_hook(stop, with_kwargs=True)]
        if self._leader is not None:
            handles.append(self._leader.register_forward_hook(led))
        try:
            with torch.no_grad():
                self._run(call, swap)
        except _FirstBlock as reached:
            return reached.arguments
        finally:
            for handle in handles:
                handle.remove()
        raise Refusal(
            f"a loop that does not call its first block of {self._name}",
            expected="one that calls all of them",
            where=self._where,
        )

    def _kinds(
        self, first: BlockCall, lengths: Mapping[str, int]
    ) -> Iterator[dict[str, Kinds]]:
        """Numbers that the blocks are given and that may count some of a stream's tokens."""
        names = list(inspect.signature(type(first.block).forward).parameters)[1:]
        for name, count in first.arguments.items():
            for stream, length in lengths.items():
                if type(count) is int and 0 < count < length:
                    place = names.index(name)
                    for counted in (1, 0):
                        yield {stream: Kinds(name, place, counted)}

    def _row_counts(
        self,
        facts: LoopFacts,
        lengths: Mapping[str, int],
        integers: Sequence[Mapping[str, int]],
    ) -> Iterator[Rows]:
        """The integers that may count the image's rows."""
        stream = facts.latents
        if stream is None or facts.context is not None or stream not in lengths:
            return
        for name, count in integers[0].items():
            known = all(run.get(name, 0) > 1 for run in integers)
            if known and name in self._loop.arguments and not lengths[stream] % count:
                yield Rows(stream, name, count)


class _FirstBlock(Exception):
    """Ends a forward at its first block."""

    def __init__(self, arguments: Arguments) -> None:
        super().__init__()
        self.arguments = arguments


def _segments(
    lengths: Mapping[str, int], kinds: Mapping[str, Kinds], first: Arguments
) -> tuple[dict[str, tuple[str, ...]], dict[str, int]]:
    """The segments of each stream, named as the runtime does, and their lengths."""
    parts: dict[str, tuple[str, ...]] = {name: (name,) for name in lengths}
    found = dict(lengths)
    for stream, kind in kinds.items():
        count = first[kind.parameter]
        sizes = [count, found.pop(stream) - count]
        parts[stream] = (f"{stream}.0", f"{stream}.1")
        found |= dict(zip(parts[stream], sizes[:: 1 - 2 * kind.counted], strict=True))
    return parts, found


def _rank_input(shard: Shard, whole: Arguments, local: Arguments) -> RankInput:
    """How a rank's arguments differ from those of the whole run.

    A tensor that is no part of the whole run's is taken whole: blocks that read it then
    show what is wrong.
    """
    cuts: dict[str, TokenCut] = {}
    locals_ = dict(tensor_leaves(local))
    for path, leaf in tensor_leaves(whole):
        try:
            cut = cut_of(leaf, locals_[path], shard) if path in locals_ else None
        except Unlike:
            continue
        if cut is not None:
            cuts[path] = cut
    integers = {
        name: value
        for name, value in local.items()
        if type(value) is int and value != whole.get(name)
    }
    alike = {
        tuple(leaf.shape): cuts[path]
        for path, leaf in tensor_leaves(whole)
        if path in cuts
    }
    return RankInput(shard, cuts, integers, frozenset(whole), alike)


def _part_like(whole: Any, local: Any, shard: Shard) -> Any:
    """The rank's part of an output, cut to the shapes of what the rank itself returned."""
    if isinstance(whole, torch.Tensor):
        fitting = shard.candidates(whole.shape, local.shape)
        return shard.select(whole, fitting[0]) if fitting else whole
    if isinstance(whole, tuple | list):
        parts = zip(whole, local, strict=True)
        return type(whole)(_part_like(one, other, shard) for one, other in parts)
    return whole


def _local(value: Any, axes: tuple[TokenAxis, ...], shard: Shard) -> Any:
    """The rank's part of a variable; a mask over pairs keeps all its columns."""
    if not axes or value is None:
        return value
    if axes[0].item is not None:
        items = {axis.item: axis for axis in axes}
        return tuple(
            _along(item, items[i], shard) if i in items else item
            for i, item in enumerate(value)
        )
    return _along(value, axes[0], shard)


def _along(value: Any, axis: TokenAxis, shard: Shard) -> Any:
    if isinstance(value, torch.Tensor):
        total = sum(shard.lengths[name] for name in axis.streams)
        repeats = value.shape[axis.dim] // total if axis.repeated else 1
        if value.ndim <= axis.dim or value.shape[axis.dim] != total * repeats:
            return value
        return shard.select(value, TokenCut(axis.dim, axis.streams, repeats=repeats))
    if isinstance(value, dict):
        return {k: _along(v, axis, shard) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_along(item, axis, shard) for item in value)
    return value


def mixing_facts(
    loops: Sequence[tuple[str, Remedies, Mapping[str, str]]], where: str
) -> MixingFacts:
    """The facts of a transformer from what its loops need.

    Args:
        loops: block list, remedies, and variable of the rows by stream.
        where: `file:line` of the forward, for messages.
    """
    found = MixingFacts()
    for blocks, remedies, rows in loops:
        sums = {
            qualified_name(cls): item.texts for cls, item in remedies.token_sums.items()
        }
        summing = _starred(blocks, dict.fromkeys(remedies.summing))
        found = MixingFacts(
            rows={**found.rows, **({blocks: dict(rows)} if rows else {})},
            kinds={
                **found.kinds,
                **({blocks: remedies.kinds} if remedies.kinds else {}),
            },
            gathered={**found.gathered, **_starred(blocks, remedies.gathered)},
            row_layers={**found.row_layers, **_starred(blocks, remedies.row_layers)},
            outer_masks={**found.outer_masks, **_starred(blocks, remedies.outer_masks)},
            token_sums={**found.token_sums, **sums},
            summing=tuple(sorted({*found.summing, *summing})),
            scales=tuple(
                sorted({*found.scales, *map(qualified_name, remedies.scales)})
            ),
            selecting=tuple(
                sorted({*found.selecting, *map(qualified_name, remedies.selecting)})
            ),
            padded=tuple(
                sorted({*found.padded, *map(qualified_name, remedies.padded)})
            ),
        )
    return replace(found, refused=_refused(found, where))


def _refused(found: MixingFacts, where: str) -> dict[str, str]:
    """Patches see keys of the step before; no other mixing is known to stand that."""
    for paths, what in (
        (found.gathered, "runs on whole streams"),
        (found.row_layers, "is a convolution over the rows of the image"),
        (found.summing, "is linear attention"),
        (found.kinds, "counts the tokens of one kind"),
        (found.selecting, "takes the tokens alone that a mask marks"),
    ):
        for path in sorted(paths):
            return {"pipefusion": f"{where}: {path} {what}"}
    return {}


def _starred(blocks: str, paths: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{blocks}.*.{starred(path)}": item for path, item in paths.items()}
