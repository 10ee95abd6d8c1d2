"""What the probe found about a block's operations that mix tokens otherwise than attention.

All fields turn into plain JSON and back, as the other facts do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TokenCut:
    """Where a tensor inside a block holds tokens.

    Attributes:
        dim: the dimension.
        streams: whose tokens it holds, in order.
        rows: whether an index is a row of the image instead of a token.
        repeats: how often the streams lie one after the other (a batch folded into `dim`).
    """

    dim: int
    streams: tuple[str, ...]
    rows: bool = False
    repeats: int = 1


@dataclass(frozen=True)
class Gathered:
    """A module that runs on whole streams: its token inputs are gathered, its outputs cut.

    Attributes:
        module: qualified name of its class; a path may hold other classes in other blocks.
        inputs: cut of each tensor that holds tokens, by parameter and path below it.
        outputs: the same of what it returns, by path; "" for a bare tensor.
    """

    module: str
    inputs: Mapping[str, TokenCut]
    outputs: Mapping[str, TokenCut]


@dataclass(frozen=True)
class Kinds:
    """Two kinds of tokens in a stream, which the blocks tell apart by a number of theirs.

    Attributes:
        parameter: the blocks' parameter that counts one kind.
        place: its place among their parameters.
        counted: the kind that it counts, the first (0) or the second (1).
    """

    parameter: str
    place: int
    counted: int


@dataclass(frozen=True)
class MixingFacts:
    """How the blocks of one transformer mix tokens, attention's kernels apart.

    Attributes:
        rows: by block list, the integer that counts the image's rows, by stream: ranks
            hold whole rows, and the blocks are told how many.
        kinds: by block list, two kinds of tokens in a stream, by stream: each is cut by
            itself, and the blocks are told how many a rank holds.
        gathered: modules that run on whole streams, by path with `*` for indices.
        row_layers: convolutions over rows of the image, by path: the stream.
        outer_masks: attention modules whose mask is an outer product of one vector with
            itself, by path: "and" or "product".
        token_sums: by processor, the expressions that sum over tokens.
        summing: attention modules with such a processor, by path.
        scales: processors whose softmax scale follows the number of tokens.
        selecting: processors that take the tokens alone that a mask marks.
        padded: processors that pad a mask of all keys by the number of their own tokens.
        refused: mode to the reason why the blocks do not stand it.
    """

    rows: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    kinds: Mapping[str, Mapping[str, Kinds]] = field(default_factory=dict)
    gathered: Mapping[str, Gathered] = field(default_factory=dict)
    row_layers: Mapping[str, str] = field(default_factory=dict)
    outer_masks: Mapping[str, str] = field(default_factory=dict)
    token_sums: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    summing: tuple[str, ...] = ()
    scales: tuple[str, ...] = ()
    selecting: tuple[str, ...] = ()
    padded: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)


def mixing_from_json(data: Mapping[str, Any]) -> MixingFacts:
    """Mixing facts from their JSON; an empty mapping means that nothing mixes."""
    return MixingFacts(
        rows={blocks: dict(found) for blocks, found in data.get("rows", {}).items()},
        kinds={
            blocks: {stream: Kinds(**item) for stream, item in found.items()}
            for blocks, found in data.get("kinds", {}).items()
        },
        gathered={
            path: Gathered(
                item["module"], _cuts(item["inputs"]), _cuts(item["outputs"])
            )
            for path, item in data.get("gathered", {}).items()
        },
        row_layers=dict(data.get("row_layers", {})),
        outer_masks=dict(data.get("outer_masks", {})),
        token_sums={n: tuple(t) for n, t in data.get("token_sums", {}).items()},
        summing=tuple(data.get("summing", ())),
        scales=tuple(data.get("scales", ())),
        selecting=tuple(data.get("selecting", ())),
        padded=tuple(data.get("padded", ())),
        refused=dict(data.get("refused", {})),
    )


def _cuts(data: Mapping[str, Any]) -> dict[str, TokenCut]:
    return {
        path: TokenCut(cut["dim"], tuple(cut["streams"]), cut["rows"], cut["repeats"])
        for path, cut in data.items()
    }
