"""Blocks of a class that was not measured are refused when a transformer is wrapped."""

from __future__ import annotations

import pytest
from torch import nn

from xfuser_runtime.transformers.base_transformer import _check_blocks


def test_an_unknown_class_of_block_is_refused() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(1, 1), nn.ReLU()])
    _check_blocks(model, {"blocks": ("Linear", "ReLU")})
    with pytest.raises(ValueError, match="a ReLU in blocks, expected Linear"):
        _check_blocks(model, {"blocks": ("Linear",)})
