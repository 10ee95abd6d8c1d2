"""Nested values as flat paths: `added_cond_kwargs.resolution`, `image_rotary_emb.0`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch


def tensor_leaves(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in a nested value with its dotted path."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensor_leaves(item, _join(path, str(key)))
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from tensor_leaves(item, _join(path, str(index)))


def leaf_shapes(value: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in a nested value, by path."""
    return {path: tuple(leaf.shape) for path, leaf in tensor_leaves(value)}


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
