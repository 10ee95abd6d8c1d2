"""What a stage keeps of foreign blocks and what travels between stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from xfuser_runtime.distributed.layout import Segment, TokenLayout
from xfuser_runtime.errors import InputError
from xfuser_runtime.layers.attention import AttentionSite
from xfuser_runtime.transformers.region import BlockRegion
from xfuser_runtime.transformers.stages import EmptyBlock, StageLinks, StagePlan


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Module()
        self.norm.emb = nn.Linear(2, 2)
        self.norm.linear = nn.Linear(2, 2)
        self.is_last = True


def test_an_empty_block_keeps_its_plain_attributes_and_the_parts_that_code_reads() -> (
    None
):
    block = _Block()
    plain, kept = EmptyBlock(block), EmptyBlock(block, ("norm.emb", "norm.emb.weight"))
    assert plain.is_last and not list(plain.parameters())
    assert kept.norm.emb is block.norm.emb
    assert set(kept.state_dict()) == {"norm.emb.weight", "norm.emb.bias"}


class _Wire:
    """A channel of one process: what was sent is received in order."""

    def __init__(self) -> None:
        self.sent: list[torch.Tensor] = []

    def send(self, x: torch.Tensor, target: int) -> None:
        self.sent.append(x)

    def recv(self, buffer: torch.Tensor, source: int) -> torch.Tensor:
        return buffer.copy_(self.sent.pop(0))


def test_lists_that_the_body_filled_travel_with_the_streams() -> None:
    wire: Any = _Wire()
    plan = StagePlan((("blocks", 2),), 2)
    skips = [torch.full((1, 2), 2.0), torch.full((1, 2), 3.0)]
    StageLinks(plan, 0, "blocks", wire).exchange(1, (torch.ones(1, 2), skips, None))
    stale = (torch.zeros(1, 2), [torch.zeros(1, 2), torch.zeros(1, 2)], None)
    stream, held, nothing = StageLinks(plan, 1, "blocks", wire).exchange(1, stale)
    assert stream.tolist() == [[1, 1]] and nothing is None
    assert [x.tolist() for x in held] == [[[2, 2]], [[3, 3]]]


def _region(patch: int | None, shard: int, shards: int = 2) -> BlockRegion:
    segments = (Segment("text", 5), Segment("image", 8, 2))
    patches = 1 if patch is None else 2
    return BlockRegion(
        layout=TokenLayout(segments, patches, shards),
        patch=patch,
        shard=shard,
        call_index=0,
        links=None,
        buffers={},
    )


def _own(patch: int | None) -> list[int]:
    """The keys that both ranks bring to one pass, texts being whole on either."""
    site = AttentionSite(("image",), ("text", "image"), ("text",))
    found: list[int] = []
    for shard in (0, 1):
        region = _region(patch, shard)
        image = region.shard(torch.arange(100, 108).view(1, 8, 1, 1), 1, "image")
        keys = torch.cat([torch.arange(5).view(1, 5, 1, 1), image], dim=1)
        found += site.own_keys(region, keys, 1).flatten().tolist()
    return found


def test_each_whole_key_takes_part_from_one_rank_and_patch_alone() -> None:
    every = [*range(5), *range(100, 108)]
    assert sorted(_own(None)) == every
    assert sorted(_own(0) + _own(1)) == every


def test_keys_that_do_not_fit_the_streams_are_refused() -> None:
    site = AttentionSite(("image",), ("text", "image"), ("text",))
    with pytest.raises(InputError, match="expected 9 rows of text, image"):
        site.own_keys(_region(None, 0), torch.zeros(1, 10, 1, 1), 1)
