"""Modules that mix tokens, sums over tokens and masks built from a rank's own tokens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tests.ranks import run_ranks
from tests.runtime.layers.session import start
from xfuser_runtime.attention.api import AttentionPlan
from xfuser_runtime.attention.outer_mask import MaskVector
from xfuser_runtime.distributed.layout import Segment, TokenLayout
from xfuser_runtime.distributed.parallel_state import Group, get_sp_group
from xfuser_runtime.distributed.runtime_state import destroy_runtime_state
from xfuser_runtime.layers import (
    GatheredModule,
    TokenCut,
    wrap_gathered,
    wrap_row_layer,
)
from xfuser_runtime.layers import gathered as gathered_layer
from xfuser_runtime.transformers.region import BlockRegion

HEIGHT, WIDTH, TEXT, C = 5, 3, 4, 2
SEGMENTS = (
    Segment("image", HEIGHT * WIDTH, grain=WIDTH),
    Segment("text", TEXT),
)


class Sorting(nn.Module):
    """Sorts along the tokens: no token knows its place without all others."""

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return scale * x.sort(dim=1).values


@pytest.fixture(autouse=True)
def _no_session() -> Iterator[None]:
    yield
    destroy_runtime_state()


def _region() -> BlockRegion:
    state = start(2)
    layout = TokenLayout(SEGMENTS, 1, 2)
    state.region = BlockRegion(
        layout=layout,
        patch=None,
        shard=get_sp_group().rank_in_group,
        call_index=0,
        links=None,
        buffers={},
    )
    return state.region


def _tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, HEIGHT * WIDTH + TEXT, C, generator=generator)


def _own_rows(
    x: torch.Tensor, dim: int, lengths: list[int], group: Group
) -> torch.Tensor:
    """Sabotage: zeros for the rows of the other rank."""
    pieces = []
    for rank, length in enumerate(lengths):
        shape = list(x.shape)
        shape[dim] = length
        pieces.append(x if rank == group.rank_in_group else x.new_zeros(shape))
    return torch.cat(pieces, dim)


def _sorting_error(sabotage: bool = False) -> float:
    names = ("image", "text")

    def body(rank: int) -> float:
        region, whole = _region(), _tokens()
        if sabotage:
            gathered_layer.all_gather = _own_rows
        module = Sorting()
        name = f"{Sorting.__module__}.{Sorting.__qualname__}"
        cut = TokenCut(1, names)
        wrap_gathered(module, GatheredModule(name, {"x": cut}, {"": cut}))
        local = region.shard(whole, 1, *names)
        expected = region.shard(whole.sort(dim=1).values, 1, *names)
        found = module(local)
        return float((found - expected).abs().max())

    return max(run_ranks(body, 2))


def test_a_gathered_module_sees_the_tokens_of_all_ranks_in_their_order() -> None:
    assert _sorting_error() == 0.0
    assert _sorting_error(sabotage=True) > 0.1


def test_rows_of_a_convolution_come_from_the_neighbours() -> None:
    def body(rank: int) -> float:
        region, whole = _region(), _tokens()[:, : HEIGHT * WIDTH]
        torch.manual_seed(3)
        conv = nn.Conv2d(C, C, 3, padding=1)
        image = whole.unflatten(1, (HEIGHT, WIDTH)).permute(0, 3, 1, 2)
        expected = conv(image).flatten(2).transpose(1, 2)
        wrap_row_layer(conv, "image")
        height = region.count_rows(HEIGHT, "image")
        local = region.shard(whole, 1, "image").unflatten(1, (height, WIDTH))
        found = conv(local.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        return float((found - region.shard(expected, 1, "image")).detach().abs().max())

    assert max(run_ranks(body, 2)) < 1e-6


@pytest.mark.parametrize("form", ["and", "product"])
def test_an_outer_product_of_own_tokens_is_completed(form: str) -> None:
    names = ("image", "text")

    def body(rank: int) -> bool:
        region = _region()
        vector = _tokens()[..., 0] > 0
        if form == "product":
            vector = vector.float()
        local = region.shard(vector, 1, *names)
        every = torch.cat(
            [
                vector[:, offset + start : offset + stop]
                for shard in (0, 1)
                for name, offset in (("image", 0), ("text", HEIGHT * WIDTH))
                for start, stop in region.layout.ranges(name, None, shard)
            ],
            dim=1,
        )
        if form == "and":
            square = local[:, None, :, None] & local[:, None, None, :]
            expected = local[:, None, :, None] & every[:, None, None, :]
        else:
            square = local[:, None, :, None] * local[:, None, None, :]
            expected = local[:, None, :, None] * every[:, None, None, :]
        plan = AttentionPlan(region.layout, names, names)
        return torch.equal(MaskVector().complete(square, form, plan), expected)

    assert all(run_ranks(body, 2))


def test_shards_end_on_whole_rows() -> None:
    layout = TokenLayout(SEGMENTS, 1, 2)
    assert layout.ranges("image", None, 0) == ((0, 3 * WIDTH),)
    assert layout.ranges("image", None, 1) == ((3 * WIDTH, HEIGHT * WIDTH),)
    with pytest.raises(ValueError, match="whole grains"):
        Segment("image", 10, grain=3)
