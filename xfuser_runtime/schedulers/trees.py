"""Walks over the attributes of a scheduler: which tensors are cut like the latents.

A scheduler keeps its history (earlier model outputs, the last sample) in tensors of the
latents' extent, in attributes or in lists; all else (sigmas, counters) is common to all
patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Region:
    """The rows of one patch in tensors shaped like the latents.

    Attributes:
        ndim: number of axes of the latents.
        extent: whole extent of axis `dim`.
        dim: axis that patches cut.
        start: first row.
        stop: one past the last row.
    """

    ndim: int
    extent: int
    dim: int
    start: int
    stop: int

    @property
    def is_whole(self) -> bool:
        """True when no row lies outside."""
        return self.stop - self.start == self.extent

    def cuts(self, value: Any) -> bool:
        """True for a whole tensor shaped like the latents."""
        return (
            isinstance(value, torch.Tensor)
            and value.ndim == self.ndim
            and value.shape[self.dim] == self.extent
        )

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """View of this patch's rows."""
        return tensor.narrow(self.dim, self.start, self.stop - self.start)

    def written(self, base: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of `base` with this patch's rows taken from `tensor`."""
        result = base.to(tensor.dtype, copy=True)
        self.rows(result).copy_(self.rows(tensor))
        return result


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with every tensor changed; containers are rebuilt, all else is kept."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) is dict:
        return {key: map_tensors(item, change) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_tensors(item, change) for item in value)
    return value


def merge(values: Sequence[Any], regions: Sequence[Region]) -> Any:
    """One whole value from the values of all patches, in patch order.

    History is joined row by row.  What patches have in common is taken from the last one,
    and so is what does not match (patches of a call that was interrupted).
    """
    last = values[-1]
    if any(type(value) is not type(last) for value in values):
        return last
    if isinstance(last, torch.Tensor):
        if all(region.cuts(v) for region, v in zip(regions, values, strict=True)):
            pieces = [r.rows(v) for r, v in zip(regions, values, strict=True)]
            return torch.cat(pieces, dim=regions[-1].dim)
        return last
    if type(last) is dict:
        return {
            key: (
                merge([value[key] for value in values], regions)
                if all(key in value for value in values)
                else item
            )
            for key, item in last.items()
        }
    if type(last) in (list, tuple) and len({len(value) for value in values}) == 1:
        joined = (merge(items, regions) for items in zip(*values, strict=True))
        return type(last)(joined)
    return last


def same_in_region(first: Any, second: Any, region: Region) -> bool:
    """True when both hold the same numbers, bit for bit, as far as `region` goes.

    Values of other types than numbers, tensors and containers are taken as equal.
    """
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if first.shape != second.shape or first.dtype != second.dtype:
            return False
        if region.cuts(first):
            first, second = region.rows(first), region.rows(second)
        return torch.equal(first, second) or _equal_with_nans(first, second)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(
            same_in_region(first[key], second[key], region) for key in first
        )
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(
            same_in_region(a, b, region) for a, b in zip(first, second, strict=True)
        )
    if isinstance(first, (bool, int, float)) or first is None or second is None:
        return bool(first == second or (first != first and second != second))
    return True


def outputs_of(result: Any) -> list[Any]:
    """The values that a `step` returned: of a tuple, an output class or a tensor."""
    if isinstance(result, Mapping):
        return [getattr(result, name) for name in _fields(result)]
    return list(result) if isinstance(result, (list, tuple)) else [result]


def with_outputs(result: Any, outputs: Sequence[Any]) -> Any:
    """`result` in its own form, holding `outputs` instead."""
    if isinstance(result, Mapping):
        names = _fields(result)
        return replace(result, **dict(zip(names, outputs, strict=True)))  # type: ignore[type-var]
    return type(result)(outputs) if isinstance(result, (list, tuple)) else outputs[0]


def _fields(result: Any) -> list[str]:
    # `prev_sample` first, as in the tuple form.
    names = list(result.__dataclass_fields__)
    return sorted(names, key=lambda name: name != "prev_sample")


def _equal_with_nans(first: torch.Tensor, second: torch.Tensor) -> bool:
    if not first.is_floating_point():
        return False
    same = (first == second) | (first.isnan() & second.isnan())
    return bool(same.all())
