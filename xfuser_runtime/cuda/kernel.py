"""Operators of this package that compute on one GPU, as the compiler sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def kernel(name: str) -> Callable[[Callable[..., Any]], Any]:
    """An operator that writes to none of its inputs and takes them with any strides.

    Copies that make them contiguous would cost as much as it does.

    Args:
        name: of the operator.
    """
    tags = (torch.Tag.flexible_layout,)
    return torch.library.custom_op(
        f"xfuser_kernels::{name}", mutates_args=(), tags=tags
    )
