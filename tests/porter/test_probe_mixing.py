"""What mixes tokens inside a block is found by running the block as two ranks would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from porter.analysis.mixing import Kinds, TokenCut
from porter.errors import Refusal
from porter.probe.cuts import Shard, Unlike, cut_of
from porter.probe.locality import measure_blocks
from porter.probe.mixing import _segments
from porter.probe.rank_run import BlockCall, RankInput, Remedies, Tokens
from xfuser_runtime.transformers.latent_tokens import segments_of_kinds

B, H, W, C = 2, 5, 3, 8
TOKENS = TokenCut(1, ("x",))


class Sorting(nn.Module):
    """Each token gets the value of its rank among all: nothing of it is local."""

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return scale * x.sort(dim=1).values


class LinearAttention(nn.Module):
    """Calls a processor, as the library's attention modules do."""

    def __init__(self, processor: Any) -> None:
        super().__init__()
        self.to_v = nn.Linear(C, C)
        self.processor = processor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.processor(self, x)


class SummingProcessor:
    """Linear attention; its normaliser is a sum inside a product that is none."""

    def __call__(self, attn: Any, x: torch.Tensor) -> torch.Tensor:
        key, value = x.transpose(1, 2).exp(), attn.to_v(x)
        norm = key.sum(dim=-1, keepdim=True).transpose(1, 2) @ x.transpose(1, 2)
        scores = torch.matmul(key, value)
        return torch.matmul(x, scores) / (1 + norm.square()).transpose(1, 2)


class Block(nn.Module):
    """A pointwise map, then what the test gives."""

    def __init__(self, mix: nn.Module) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(C), mix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mix(self.norm(x))


class GridBlock(nn.Module):
    """Convolves the tokens as an image of a height that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 3, padding=1))

    def forward(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        image = x.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return x + self.inner(image).flatten(2).transpose(1, 2)


class MaskedBlock(nn.Module):
    """Attends under the outer product of a mask over its tokens, with a scale of its own."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        pairs = mask[:, None, None, :] * mask[:, None, :, None]
        q = x[:, None]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=pairs)[:, 0]


class PaddingProcessor:
    """Brings a mask of pairs to the number of its own tokens, as the library's do."""

    def __call__(self, attn: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mask = attn.prepare_attention_mask(mask, x.shape[1])
        q = attn.to_v(x)[:, None]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask[:, None])[:, 0]


class PairsBlock(nn.Module):
    """Attends under a mask of pairs of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = PaddedAttention(PaddingProcessor())

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x + self.attn(x, mask)


class PaddedAttention(LinearAttention):
    """Pads masks of another length."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.processor(self, x, mask)

    def prepare_attention_mask(self, mask: torch.Tensor, length: int) -> torch.Tensor:
        return mask if mask.shape[-1] == length else F.pad(mask, (0, length))


class Averaging(nn.Module):
    """Mixes in the block itself, outside of any module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(dim=1, keepdim=True)


def _remedies(block: nn.Module, rows: bool = False, **arguments: Any) -> Remedies:
    torch.manual_seed(0)
    length = H * W
    ranks = []
    for start, stop in ((0, 3 * W), (3 * W, length)):
        shard = Shard({"x": (start, stop)}, {"x": length}, {"x": W} if rows else {})
        integers = {"height": (stop - start) // W} if rows else {}
        cuts = {"x": TOKENS, "mask": TOKENS}
        ranks.append(RankInput(shard, cuts, integers))
    call = BlockCall(block, {"x": torch.randn(B, length, C), **arguments})
    found = Remedies()
    tokens = Tokens(tuple(ranks), {"": ("x",), "attn": ("x",)}, (), "toy.py:1")
    with torch.no_grad():
        measure_blocks([call], tokens, found)
    return found


def test_a_block_that_maps_tokens_by_themselves_needs_nothing() -> None:
    assert _remedies(Block(nn.Linear(C, C))) == Remedies()


def test_a_module_that_sorts_tokens_runs_on_all_of_them() -> None:
    found = _remedies(Block(Sorting()))
    (item,) = found.gathered.values()
    assert list(found.gathered) == ["mix"] and item.module.endswith(".Sorting")
    assert item.inputs == {"x": TOKENS} and item.outputs == {"": TOKENS}


def test_a_processor_that_sums_over_tokens_sums_over_ranks() -> None:
    found = _remedies(Block(LinearAttention(SummingProcessor())))
    assert found.token_sums[SummingProcessor].texts == (
        "key.sum(dim=-1, keepdim=True)",
        "torch.matmul(key, value)",
    )
    assert found.summing == {"mix"} and not found.gathered


def test_a_convolution_over_rows_exchanges_its_halo() -> None:
    found = _remedies(GridBlock(), rows=True, height=H, width=W)
    assert found.row_layers == {"inner.1": "x"} and not found.gathered


def test_a_block_that_is_told_the_whole_height_is_refused() -> None:
    with pytest.raises(Refusal, match="fails on part of its tokens"):
        _remedies(GridBlock(), height=H, width=W)


def test_the_outer_product_of_a_mask_is_recognised() -> None:
    mask = torch.ones(B, H * W)
    mask[1, 4:7] = 0
    found = _remedies(MaskedBlock(), mask=mask)
    assert found.outer_masks == {"": "product"}


def test_a_processor_that_pads_a_mask_of_all_keys_is_noted() -> None:
    mask = torch.randn(B, H * W, H * W)
    block = PairsBlock()
    assert _remedies(block, mask=mask) == Remedies(padded={PaddingProcessor})
    # The module is left as it was.
    assert "prepare_attention_mask" not in vars(block.attn)


def test_mixing_in_the_block_itself_is_refused() -> None:
    with pytest.raises(Refusal, match="a block that mixes tokens"):
        _remedies(Averaging())


def test_a_cut_is_told_by_values() -> None:
    shard = Shard({"a": (0, 2), "b": (3, 4)}, {"a": 4, "b": 4}, {})
    whole = torch.randn(2, 8, 3)
    cut = cut_of(whole, whole[:, [0, 1, 7]], shard)
    assert cut == TokenCut(1, ("a", "b"))
    assert cut_of(whole, whole.clone(), shard) is None
    with pytest.raises(Unlike):
        cut_of(whole, whole[:, [0, 1, 6]], shard)


@pytest.mark.parametrize(("counted", "sizes"), [(0, (5, 3)), (1, (3, 5))])
def test_kinds_of_tokens_are_segments_as_the_runtime_names_them(
    counted: int, sizes: tuple[int, int]
) -> None:
    kinds = {"x": Kinds("count", 2, counted)}
    parts, lengths = _segments({"x": 8, "text": 3}, kinds, {"count": 5})
    assert parts == {"x": ("x.0", "x.1"), "text": ("text",)}
    assert lengths == {"text": 3, "x.0": sizes[0], "x.1": sizes[1]}
    assert segments_of_kinds({"x": 8, "text": 3}, {"x": sizes})[0] == lengths


def test_of_cuts_that_fit_one_without_repeats_comes_first() -> None:
    shard = Shard({"x": (0, 2), "text": (0, 8)}, {"x": 4, "text": 16}, {})
    alike = torch.ones(1, 16)
    assert cut_of(alike, alike[:, :8], shard) == TokenCut(1, ("text",))
