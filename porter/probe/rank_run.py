"""A block as one of the simulated ranks runs it, with the remedies found so far."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from porter.analysis.mixing import Gathered, Kinds, TokenCut
from porter.errors import Refusal
from porter.probe.cuts import Shard, Unlike, cut_of
from porter.probe.masks import mask_form
from porter.probe.sharded_block import BlockRunner, Place, Trace, part_of
from porter.probe.token_sums import ProcessorSums
from porter.verify.hooks import AttentionCall


@dataclass(frozen=True)
class BlockCall:
    """A block and its arguments, by parameter, as the model called it."""

    block: nn.Module
    arguments: Mapping[str, Any]


@dataclass
class Remedies:
    """What the blocks of one loop need, by path inside a block or by class of processor."""

    gathered: dict[str, Gathered] = field(default_factory=dict)
    row_layers: dict[str, str] = field(default_factory=dict)
    outer_masks: dict[str, str] = field(default_factory=dict)
    token_sums: dict[type, ProcessorSums] = field(default_factory=dict)
    summing: set[str] = field(default_factory=set)
    scales: set[type] = field(default_factory=set)
    selecting: set[type] = field(default_factory=set)
    padded: set[type] = field(default_factory=set)
    kinds: dict[str, Kinds] = field(default_factory=dict)


@dataclass(frozen=True)
class RankInput:
    """What one of the simulated ranks holds, and what its blocks are given.

    Attributes:
        shard: its rows.
        cuts: where the blocks' arguments hold tokens, by parameter and path below it.
        integers: parameters that have another number on this rank.
        known: the parameters that the first block is given.
        alike: cuts by shape, for the tensors that later blocks alone are given (skip
            connections); a wrong one shows as a block that maps its tokens otherwise.
    """

    shard: Shard
    cuts: Mapping[str, TokenCut]
    integers: Mapping[str, int]
    known: frozenset[str] = frozenset()
    alike: Mapping[tuple[int, ...], TokenCut] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokens:
    """How the tokens of a loop are spread over the simulated ranks.

    Attributes:
        ranks: the ranks.
        attention: paths, `*` for indices, of the attention modules on sharded keys, with
            the streams of the keys.
        whole: streams of keys that every rank holds whole.
        where: `file:line` of the loop, for messages.
    """

    ranks: tuple[RankInput, ...]
    attention: Mapping[str, tuple[str, ...]]
    whole: tuple[str, ...]
    where: str


def starred(path: str) -> str:
    """A module's path with `*` for the indices inside it."""
    return re.sub(r"\.\d+\.", ".*.", path)


class RankRun:
    """One run of a block on a rank's rows, kernel results taken from the whole run."""

    def __init__(
        self,
        call: BlockCall,
        tokens: Tokens,
        remedies: Remedies,
        whole: Trace,
        rank: RankInput,
    ) -> None:
        self._call = call
        self._tokens = tokens
        self._remedies = remedies
        self._whole = whole
        self._rank = rank
        self._shard = rank.shard
        self._modules = dict(call.block.named_modules())
        self.new_remedy = False
        self.problem = ""

    def run(self, sums: Mapping[str, tuple[nn.Module, ProcessorSums]]) -> Trace:
        """The trace of the rank."""
        replaced = {
            path: self._replacement(path, item.outputs)
            for path, item in self._remedies.gathered.items()
            if is_gathered(self._modules.get(path), path, self._remedies)
        } | {
            path: self._replacement(path, {"": TokenCut(2, (stream,), rows=True)})
            for path, stream in self._remedies.row_layers.items()
            if isinstance(self._modules.get(path), nn.Conv2d)
        }
        runner = BlockRunner(
            self._call.block, self._attend, replaced, self._remedies.padded
        )
        with ProcessorSums.replayed(sums):
            return runner.run(self._arguments())

    def _replacement(self, path: str, cuts: Mapping[str, TokenCut]) -> Any:
        def result(number: int) -> Any:
            return part_of(self._whole.uses[path, number].result, cuts, self._shard)

        return result

    def _arguments(self) -> dict[str, Any]:
        return {
            name: self._rank.integers.get(
                name, part_of(value, self._cuts(name, value), self._shard, name)
            )
            for name, value in self._call.arguments.items()
        }

    def _cuts(self, name: str, value: Any) -> Mapping[str, TokenCut]:
        """Where an argument holds tokens, by path."""
        if name in self._rank.known or not isinstance(value, torch.Tensor):
            return self._rank.cuts
        cut = self._rank.alike.get(tuple(value.shape))
        return self._rank.cuts if cut is None else {name: cut}

    def _attend(self, place: Place, call: AttentionCall) -> torch.Tensor:
        path, key = place[0], starred(place[0])
        if key not in self._tokens.attention:
            return call.run()
        whole = self._whole.attention.get(place)
        if whole is None:
            self.problem = (
                f"attention {key} that is called differently on part of the tokens"
            )
            return call.run()
        reference, result = whole
        whole_keys = set(self._tokens.attention[key]) & set(self._tokens.whole)
        try:
            queries = cut_of(reference.query, call.query, self._shard)
            if whole_keys and queries is not None:
                # The runtime takes a part of the whole streams on each rank.
                return self._shard.select(result, TokenCut(2, queries.streams))
            keys = cut_of(reference.key, call.key, self._shard)
            if queries is None or keys is None:
                raise Unlike
            cut_of(reference.value, call.value, self._shard)
        except Unlike:
            self.problem = self.problem or (
                f"attention {key} whose queries or keys are not those of the tokens"
            )
            return call.run()
        self._check_scale(path, reference, call)
        self._check_mask(path, reference, call, queries, keys)
        return self._shard.select(result, TokenCut(2, queries.streams))

    def _check_scale(
        self, path: str, reference: AttentionCall, call: AttentionCall
    ) -> None:
        if reference.scale == call.scale:
            return
        processor = type(getattr(self._modules[path], "processor", None))
        if processor not in self._remedies.scales:
            self._remedies.scales.add(processor)
            self.new_remedy = True

    def _check_mask(
        self,
        path: str,
        reference: AttentionCall,
        call: AttentionCall,
        queries: TokenCut,
        keys: TokenCut,
    ) -> None:
        try:
            form = mask_form(
                reference.attn_mask,
                call.attn_mask,
                queries=queries,
                keys=keys,
                all_keys=reference.key.shape[-2],
                shard=self._shard,
            )
        except Unlike:
            raise Refusal(
                f"attention {starred(path)} with a mask that is built inside the block from"
                " the number of its tokens",
                expected="a mask of the keys, of all pairs, or an outer product",
                where=self._tokens.where,
            ) from None
        if form is not None and path not in self._remedies.outer_masks:
            self._remedies.outer_masks[path] = form
            self.new_remedy = True


def is_gathered(module: nn.Module | None, path: str, remedies: Remedies) -> bool:
    """True for a module that runs on gathered tokens; other blocks may hold another."""
    gathered = remedies.gathered.get(path)
    return gathered is not None and class_name(module) == gathered.module


def class_name(module: Any) -> str:
    """`module.Class` of an object."""
    return f"{type(module).__module__}.{type(module).__qualname__}"
