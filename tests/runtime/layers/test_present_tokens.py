"""Joint attention over the text tokens that a mask marks, on cut tokens.

Shapes: (1, heads, tokens, width), seven tokens of an image before five of text.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from tests.ranks import RankError, run_ranks
from tests.runtime.layers.modules import attention
from tests.runtime.layers.session import GATE, error, start
from xfuser_runtime.distributed.layout import Segment, TokenLayout
from xfuser_runtime.distributed.parallel_state import get_sp_group
from xfuser_runtime.distributed.runtime_state import destroy_runtime_state
from xfuser_runtime.layers import wrap_attention

IMAGE, TEXT = 7, 5
NAMES = ("image", "text")


@pytest.fixture(autouse=True)
def _no_session() -> Iterator[None]:
    yield
    destroy_runtime_state()


def _qkv() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, IMAGE + TEXT, 4)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def _upstreams(mask: torch.Tensor) -> torch.Tensor:
    """Attention over the picked tokens, zeros behind."""
    picked = torch.nonzero(mask).flatten() + IMAGE
    rows = torch.cat([torch.arange(IMAGE), picked])
    out = F.scaled_dot_product_attention(*(x[:, :, rows] for x in _qkv()))
    return F.pad(out, (0, 0, 0, IMAGE + TEXT - len(rows)))


def _on_ranks(mode: tuple[int, int], mask: torch.Tensor) -> torch.Tensor:
    def body(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        state = start(*mode)
        module = wrap_attention(attention(), NAMES, NAMES)
        size = mode[0] * mode[1]
        layout = TokenLayout((Segment("image", IMAGE), Segment("text", TEXT)), 1, size)
        state.region = SimpleNamespace(
            layout=layout, patch=None, call_index=0, expand=tuple, first_site=None
        )
        shard = get_sp_group().rank_in_group
        parts = [
            torch.arange(start, stop) + offset
            for name, offset in (("image", 0), ("text", IMAGE))
            for start, stop in layout.ranges(name, None, shard)
        ]
        rows = torch.cat(parts)
        mine = mask[rows[rows >= IMAGE] - IMAGE]
        assert module.present_tokens(mine).tolist() == list(range(len(mine)))
        out = module.scaled_dot_product_attention(
            *(x[:, :, rows] for x in _qkv()), present=mine
        )
        return rows, out

    whole = torch.zeros(1, 2, IMAGE + TEXT, 4)
    for rows, out in run_ranks(body, mode[0] * mode[1]):
        whole[:, :, rows] = out
    return whole


@pytest.mark.parametrize("mode", [(2, 1), (1, 2)])
@pytest.mark.parametrize("count", [0, 2, TEXT])
def test_as_upstream_with_the_picked_tokens(mode: tuple[int, int], count: int) -> None:
    mask = torch.arange(TEXT) < count
    assert error(_on_ranks(mode, mask), _upstreams(mask)) <= GATE


@pytest.mark.parametrize("left_out", [0, 3])
def test_padding_before_the_end_of_the_prompt_is_refused(left_out: int) -> None:
    mask = torch.arange(TEXT) != left_out
    with pytest.raises(RankError, match="expected padding behind the prompt"):
        _on_ranks((2, 1), mask)


def test_whole_tokens_are_picked_as_upstream_does() -> None:
    start()
    module = wrap_attention(attention(), NAMES, NAMES)
    mask = torch.tensor([True, False, True])
    assert module.present_tokens(mask).tolist() == [0, 2]
