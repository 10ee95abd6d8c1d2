"""Operators of this package that compute on one GPU, as the compiler sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

_LIBRARY = torch.library.Library("xfuser_kernels", "FRAGMENT")
_TAGS = (torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag)


def kernel(name: str, fake: Callable[..., Any]) -> Callable[[Any], Any]:
    """Make a function an operator for inference that compiled code calls.

    It writes to none of its inputs and takes them with any strides: copies that make them
    contiguous would cost as much as it does. Registered as it is, a call costs the host a third of
    what it does through `torch.library.custom_op`, and a call that no graph holds is bound by
    such costs.

    Args:
        name: of the operator, in the namespace `xfuser_kernels`.
        fake: gives empty results for the same arguments.
    """

    def register(function: Any) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=_TAGS)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"xfuser_kernels::{name}", fake, lib=_LIBRARY)
        return function

    return register


def empty_joined(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """An empty result of the shape that the parts have once they are joined along `dim`."""
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return parts[0].new_empty(shape)


def dense(rows: torch.Tensor) -> torch.Tensor:
    """The tensor, copied where its last dimension does not lie densely."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def places(
    parts: Sequence[torch.Tensor], out: torch.Tensor, dim: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Each part, its place in the joined result and where that begins along `dim`.

    The last dimension of a part lies densely, which kernels count on.
    """
    first = 0
    for part in parts:
        length = part.shape[dim]
        yield dense(part), out.narrow(dim, first, length), first
        first += length
