"""Modules that mix tokens run on the whole of them: inputs are gathered, outputs cut.

What a module does with its tokens does not matter then: sorting, routing, running sums.
The price is that every rank computes it for all tokens.

Shapes: any; one dimension of a tensor holds tokens, or rows of tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from xfuser_runtime.base_wrapper import swap_class
from xfuser_runtime.distributed.collectives import all_gather
from xfuser_runtime.distributed.parallel_state import get_sp_group
from xfuser_runtime.distributed.runtime_state import active_region
from xfuser_runtime.errors import InputError
from xfuser_runtime.layers.base import derive, rebind_forward, xFuserLayerBaseWrapper

_CUTS = "_xfuser_token_cuts"


@dataclass(frozen=True)
class TokenCut:
    """Where a tensor holds tokens.

    Args:
        dim: the dimension.
        streams: whose tokens, in order.
        rows: an index is a row of the image, not a token.
        repeats: how often the streams lie one after the other (a batch folded into `dim`).
    """

    dim: int
    streams: tuple[str, ...]
    rows: bool = False
    repeats: int = 1


@dataclass(frozen=True)
class GatheredModule:
    """What a transformer says of a module that mixes tokens.

    Args:
        module: qualified name of its class; modules of other classes at the path are plain.
        inputs: cuts of its tensors, by parameter and path below it, joined by dots.
        outputs: cuts of what it returns, by path; "" for a bare tensor.
    """

    module: str
    inputs: Mapping[str, TokenCut]
    outputs: Mapping[str, TokenCut]

    def matches(self, module: nn.Module) -> bool:
        """True for a module of the class."""
        cls = type(module)
        return self.module == f"{cls.__module__}.{cls.__qualname__}"


class xFuserGatheredLayerWrapper(xFuserLayerBaseWrapper):
    """A module that sees the tokens of all ranks."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream's, on whole streams; returns this rank's part.

        Raises:
            InputError: a pass over one patch, which lacks the others' tokens.
        """
        region = active_region()
        if region is None or region.whole:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if region.patch is not None:
            raise InputError(
                f"a patch of tokens for {type(self).__name__}, expected all of them; use "
                "warmup_steps >= the number of steps"
            )
        cuts: GatheredModule = vars(self)[_CUTS]
        bound = inspect.signature(super().forward).bind(*args, **kwargs)  # type: ignore[misc]
        for name, value in bound.arguments.items():
            bound.arguments[name] = _mapped(value, cuts.inputs, name, region, _whole)
        result = super().forward(*bound.args, **bound.kwargs)  # type: ignore[misc]
        return _mapped(result, cuts.outputs, "", region, _part)


def wrap_gathered(module: nn.Module, cuts: GatheredModule) -> nn.Module:
    """Make a module see the tokens of all ranks; returns the same object."""
    original = type(module)
    if not issubclass(original, xFuserGatheredLayerWrapper):
        swap_class(module, derive(xFuserGatheredLayerWrapper, original))
        rebind_forward(module, original)
    vars(module)[_CUTS] = cuts
    return module


def _mapped(
    value: Any, cuts: Mapping[str, TokenCut], path: str, region: Any, change: Any
) -> Any:
    """A nested value with `change(region, tensor, cut)` at every tensor that has a cut."""
    if isinstance(value, torch.Tensor):
        return change(region, value, cuts[path]) if path in cuts else value
    if isinstance(value, Mapping):
        pairs = ((k, f"{path}.{k}" if path else str(k)) for k in value)
        return {k: _mapped(value[k], cuts, below, region, change) for k, below in pairs}
    if isinstance(value, (tuple, list)):
        return type(value)(
            _mapped(item, cuts, f"{path}.{i}" if path else str(i), region, change)
            for i, item in enumerate(value)
        )
    return value


def _whole(region: Any, local: torch.Tensor, cut: TokenCut) -> torch.Tensor:
    """All rows of a tensor in upstream's order."""
    dim = cut.dim % local.ndim
    rows = local.unflatten(dim, (cut.repeats, -1))
    ranges = [_ranges(region, cut, shard) for shard in _shards(region)]
    lengths = [sum(stop - start for start, stop in found) for found in ranges]
    gathered = all_gather(rows, dim + 1, lengths, get_sp_group())
    source = 0
    pieces: list[tuple[int, int, int]] = []
    for start, stop in (piece for found in ranges for piece in found):
        pieces.append((start, source, stop - start))
        source += stop - start
    ordered = [gathered.narrow(dim + 1, at, n) for _, at, n in sorted(pieces) if n]
    whole = ordered[0] if len(ordered) == 1 else torch.cat(ordered, dim + 1)
    return whole.flatten(dim, dim + 1)


def _part(region: Any, whole: torch.Tensor, cut: TokenCut) -> torch.Tensor:
    """This rank's rows of a tensor that holds all of them."""
    dim = cut.dim % whole.ndim
    rows = whole.unflatten(dim, (cut.repeats, -1))
    pieces = [
        rows.narrow(dim + 1, start, stop - start)
        for start, stop in _ranges(region, cut, region.shard_index)
    ]
    if not pieces:
        return rows.narrow(dim + 1, 0, 0).flatten(dim, dim + 1)
    return torch.cat(pieces, dim + 1).flatten(dim, dim + 1)


def _shards(region: Any) -> range:
    return range(region.layout.num_shards)


def _ranges(region: Any, cut: TokenCut, shard: int) -> list[tuple[int, int]]:
    """Indices of the whole dimension that a shard holds, in its order."""
    segments = {segment.name: segment for segment in region.layout.segments}
    names = region.expand(cut.streams)
    units = [segments[name].grain if cut.rows else 1 for name in names]
    extents = [segments[n].length // u for n, u in zip(names, units, strict=True)]
    offsets = accumulate(extents, initial=0)
    return [
        (offset + start // unit, offset + stop // unit)
        for name, unit, offset in zip(names, units, offsets, strict=False)
        for start, stop in region.layout.ranges(name, region.patch, shard)
    ]
