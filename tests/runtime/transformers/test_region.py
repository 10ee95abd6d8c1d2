"""What a block region cuts: values by token, and values that are given once for all."""

from __future__ import annotations

import pytest
import torch

from xfuser_runtime.distributed.layout import Segment, TokenLayout
from xfuser_runtime.transformers.region import BlockRegion


def _region(length: int) -> BlockRegion:
    return BlockRegion(
        layout=TokenLayout((Segment("x", length),), 1, 2),
        patch=None,
        shard=1,
        call_index=0,
        links=None,
        buffers={},
    )


def test_a_value_by_token_is_cut_and_one_for_all_tokens_is_not() -> None:
    region = _region(5)
    by_token = torch.arange(5.0).view(1, 5, 1, 1)
    assert region.shard(by_token, 1, "x", ndim=4).flatten().tolist() == [3, 4]
    once = torch.zeros(1, 5, 1)
    assert region.shard(once, 1, "x", ndim=4) is once
    broadcast = torch.zeros(1, 1, 1, 1)
    assert region.shard(broadcast, 1, "x", ndim=4) is broadcast
    assert region.shard(None, 1, "x", ndim=4) is None


def test_a_value_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 5 tokens of x"):
        _region(5).shard(torch.zeros(1, 6, 1, 1), 1, "x", ndim=4)
    with pytest.raises(ValueError, match="expected 5 tokens of x"):
        _region(5).shard(torch.zeros(1, 1, 1), 1, "x")
