"""Operators of this package that compute on one GPU, as the compiler sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("xfuser_kernels", "FRAGMENT")
_TAGS = (torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag)


def kernel(name: str, fake: Callable[..., torch.Tensor]) -> Callable[[Any], Any]:
    """Make a function an operator for inference that compiled code calls.

    It writes to none of its inputs and takes them with any strides: copies that make them
    contiguous would cost as much as it does. Registered as it is, a call costs the host a third of
    what it does through `torch.library.custom_op`, and a call that no graph holds is bound by
    such costs.

    Args:
        name: of the operator, in the namespace `xfuser_kernels`.
        fake: gives an empty result for the same arguments.
    """

    def register(function: Any) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=_TAGS)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"xfuser_kernels::{name}", fake, lib=_LIBRARY)
        return function

    return register
