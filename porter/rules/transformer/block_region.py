"""Each block loop runs on this rank's tokens.

Match:    the loops over block lists that carry image tokens.
Emit:     before the loop, the rows of this rank of every value that counts tokens; at the
          top of the body, the hand-over between stages; after the loop, the whole carried
          streams and the whole of what the body made for later code. The whole of a stream
          with a tail is late_gather's.
Manual:   2 (the sharding that the manual leaves to the attention layers)

Token axes are literals, measured by the probe.  A value that the loop only reads keeps its
name outside the loop and is called `local_<name>` inside, because code after the loop may
read the whole of it.  A list that the body fills or empties keeps its name and travels with
the streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import libcst as cst

from porter.analysis.block_loops import BlockLoop
from porter.analysis.facts import LoopFacts, TokenAxis
from porter.analysis.forward import Forward
from porter.analysis.mixing import Kinds, MixingFacts
from porter.parsed import ParsedModule, Statement, dotted, find, walk
from porter.rules.base import Edit, Rule


class BlockRegion(Rule[Forward]):
    """Shards before, hands over inside and gathers after each block loop."""

    manual = "2"
    summary = "each block loop runs on this rank's tokens"

    def expected(self, module: ParsedModule, facts: Forward) -> tuple[int, int]:
        """One match a measured loop."""
        return len(facts.facts.loops), len(facts.facts.loops)

    def edits(self, module: ParsedModule, facts: Forward) -> Sequence[Edit]:
        """The edits of all loops."""
        edits: list[Edit] = []
        entered: list[cst.If] = []
        for loop, measured in facts.regions:
            outer: Statement = loop.node
            if loop.around is not None and loop.around not in entered:
                entered.append(loop.around)
                outer = loop.around
            edits.extend(
                self._loop_edits(module, loop, measured, facts.facts.mixing, outer)
            )
        return edits

    def _loop_edits(
        self,
        module: ParsedModule,
        loop: BlockLoop,
        facts: LoopFacts,
        mixing: MixingFacts,
        outer: Statement,
    ) -> Iterator[Edit]:
        """The edits of one loop; `outer` is the statement that its start stands before."""
        row_counts = mixing.rows.get(loop.blocks, {})
        kinds = mixing.kinds.get(loop.blocks, {})
        carried = [name for name in loop.carried if name in facts.values]
        carried += facts.travels
        own = {*carried, *loop.filled}
        before = [_begin(module, loop, facts, row_counts, kinds)]
        for stream, kind in kinds.items():
            rows = f'region.rows("{stream}.{kind.counted}")'
            before.append(f"{_local(kind.parameter)} = {rows}")
        for stream, name in row_counts.items():
            before.append(f'{_local(name)} = region.count_rows({name}, "{stream}")')
        for name, axes in facts.values.items():
            target = name if name in own else _local(name)
            before.append(f"{target} = {_shard(name, axes)}")
        for name, streams in facts.counts.items():
            before.append(f"{_local(name)} = region.rows({_quoted(streams)})")
        before += [f"{name} = {stream}" for name, stream in facts.fresh.items()]
        late = facts.tail.stream if facts.tail else None
        after = [
            gathered(name, axes[0])
            for name, axes in (
                *((name, facts.values[name]) for name in carried),
                *facts.after.items(),
            )
            if name != late and (name not in facts.travels or name in loop.alive)
        ]
        at = loop.node
        names = ", ".join((*carried, *facts.filled))
        hand_over = f"{names} = region.hand_over({names})"
        edits = [
            self.insert_before(module, outer, "\n".join(before), at=at),
            self.insert_before(module, _first(loop.node), hand_over, at=at),
        ]
        if after:
            edits.append(self.insert_after(module, loop.node, "\n".join(after), at=at))
        for edit in edits:
            yield replace(edit, outside=True)
        read = {*facts.values, *facts.counts, *row_counts.values()} - own
        counted = [
            (kind, argument)
            for kind in kinds.values()
            for argument in _arguments(loop, kind)
        ]
        for kind, argument in counted:
            local = _local(kind.parameter)
            yield self.replace(module, argument.value, local, at=at)
        inside = {node for _, argument in counted for node in walk(argument)}
        for node in _reads(loop, read):
            if node not in inside:
                yield self.replace(module, node, _local(node.value), at=at)


def gathered(name: str, axis: TokenAxis) -> str:
    """The statement that makes `name` hold the tokens of all ranks."""
    return f"{name} = region.gather({name}, {_axis(axis)}{_ndim(axis)})"


def _arguments(loop: BlockLoop, kind: Kinds) -> list[cst.Arg]:
    """What each block call hands to the parameter that counts."""
    return [
        argument
        for call in loop.calls
        for node in find(call.statement, cst.Call)
        if dotted(node.func) == loop.block
        for place, argument in enumerate(node.args)
        if (argument.keyword.value if argument.keyword else place)
        in (kind.parameter, kind.place)
    ]


def _begin(
    module: ParsedModule,
    loop: BlockLoop,
    facts: LoopFacts,
    row_counts: Mapping[str, str],
    kinds: Mapping[str, Kinds],
) -> str:
    streams = ", ".join(
        f'"{name}": {variable}.shape[{dim}]'
        for name, (variable, dim) in facts.lengths.items()
    )
    latents = f", latents={facts.latents!r}" if facts.latents else ""
    if facts.context:
        latents += f", context={facts.context!r}"
    if facts.rows:
        latents += f", rows={dict(facts.rows)!r}"
    if facts.other_rows:
        others = {ndim: dict(rows) for ndim, rows in facts.other_rows.items()}
        latents += f", other_rows={others!r}"
    if row_counts:
        counts = ", ".join(f'"{name}": {count}' for name, count in row_counts.items())
        latents += f", row_counts={{{counts}}}"
    for name, kind in kinds.items():
        variable, dim = facts.lengths[name]
        count = module.source(_arguments(loop, kind)[0].value)
        sizes = [count, f"{variable}.shape[{dim}] - {count}"][:: 1 - 2 * kind.counted]
        latents += f', kinds={{"{name}": ({", ".join(sizes)})}}'
    return f'region = self._begin_region("{facts.blocks}", {{{streams}}}{latents})'


def _shard(name: str, axes: tuple[TokenAxis, ...]) -> str:
    """The rows of a value; of a tuple's items one by one where they hold other tokens."""
    if axes[0].keys is not None:
        streams = _quoted(axes[0].streams)
        return f"region.shard_pairs({name}, {axes[0].dim}, {axes[0].keys}, {streams})"
    if axes[0].item is None:
        return f"region.shard({name}, {_axis(axes[0])}{_ndim(axes[0])})"
    items = ", ".join(f"{axis.item}: ({_axis(axis)})" for axis in axes)
    return f"region.shard_items({name}, {{{items}}})"


def _axis(axis: TokenAxis) -> str:
    return f"{axis.dim}, {_quoted(axis.streams)}"


def _ndim(axis: TokenAxis) -> str:
    """What tells tensors that hold tokens from others, and how they hold them."""
    repeated = ", repeated=True" if axis.repeated else ""
    return f", ndim={axis.ndim}{repeated}" if axis.optional else repeated


def _quoted(streams: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in streams)


def _local(name: str) -> str:
    return f"local_{name}"


def _first(node: cst.For) -> Statement:
    first = node.body.body[0]
    assert isinstance(first, cst.SimpleStatementLine | cst.BaseCompoundStatement)
    return first


def _reads(loop: BlockLoop, names: set[str]) -> Iterator[cst.Name]:
    """Places in the body that read `names`; keywords, attributes and dead code excluded."""
    skipped: set[cst.CSTNode] = set()
    for test in loop.checkpoints:
        skipped.update(walk(test.body))
        skipped.update(walk(test.test))
    for call in loop.calls:
        if call.choice is not None:
            skipped.update(walk(call.choice.body))
            skipped.update(walk(call.choice.test))
    for node in walk(loop.node.body):
        if isinstance(node, cst.Arg) and node.keyword is not None:
            skipped.add(node.keyword)
        if isinstance(node, cst.Attribute):
            skipped.add(node.attr)
        if isinstance(node, cst.Name) and node not in skipped and node.value in names:
            yield node
