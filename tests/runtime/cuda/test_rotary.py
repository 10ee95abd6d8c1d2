"""Rotary embeddings and norms of heads as one operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import nn
from torch.fx import Node

from tests.runtime.cuda.rewritten import check, names
from xfuser_runtime.cuda.rotary import rotated_heads

pytestmark = pytest.mark.usefixtures("inference")

BATCH, TEXT, IMAGE, HEADS, CHANNELS = 2, 5, 9, 3, 8


def heads(tokens: int = IMAGE, sequence_dim: int = 1) -> torch.Tensor:
    x = torch.randn(BATCH, tokens, HEADS, CHANNELS)
    return x if sequence_dim == 1 else x.transpose(1, 2)


def angles(tokens: int = IMAGE) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(tokens, CHANNELS), torch.randn(tokens, CHANNELS)


def parts(kernels: list[Node]) -> list[tuple[int, int]]:
    """How many tensors each operation joins, and how many norms it makes."""
    assert set(names(kernels)) == {"rotated_heads"}
    return [(len(x.args[0]), len(x.args[1])) for x in kernels]  # type: ignore[arg-type]


@pytest.mark.parametrize("sequence_dim", [1, 2])
def test_without_a_norm(sequence_dim: int) -> None:
    def call(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return apply_rotary_emb(x, (cos, sin), sequence_dim=sequence_dim)

    assert parts(check(call, heads(sequence_dim=sequence_dim), *angles())) == [(1, 0)]


class Normed(nn.Module):
    """The heads of two streams, normed and joined by tokens."""

    def __init__(self, eps: float = 1e-6, joined_at: int = 1) -> None:
        super().__init__()
        self.text, self.image = nn.RMSNorm(CHANNELS, 1e-6), nn.RMSNorm(CHANNELS, eps)
        self.joined_at = joined_at
        for weight in self.parameters():
            weight.uniform_(0.5, 2)

    def forward(
        self, x: torch.Tensor, y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        joined = torch.cat([self.text(x), self.image(y)], dim=self.joined_at)
        return apply_rotary_emb(joined, (cos, sin), sequence_dim=1)


def test_norms_of_two_streams() -> None:
    given = heads(TEXT), heads(IMAGE), *angles(TEXT + IMAGE)
    assert parts(check(Normed(), *given)) == [(2, 2)]


def test_norms_that_differ_stay() -> None:
    given = heads(TEXT), heads(IMAGE), *angles(TEXT + IMAGE)
    assert parts(check(Normed(eps=1e-2), *given)) == [(1, 0)]


def test_heads_that_are_joined_by_heads_stay() -> None:
    given = heads(IMAGE), heads(IMAGE), *angles()
    assert parts(check(Normed(joined_at=2), *given)) == [(1, 0)]


class Read(nn.Module):
    """Others read the normed heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(CHANNELS, 1e-6)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        normed = self.norm(x)
        return apply_rotary_emb(normed, (cos, sin), sequence_dim=1) + normed


def test_heads_that_share_their_angles() -> None:
    def call(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        cos, sin = cos[None, :, None], sin[None, :, None]
        return turned(q, cos, sin) + turned(k, cos, sin)

    def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        pairs = torch.stack([-imaginary, real], dim=-1).flatten(3)
        return (x.float() * cos + pairs.float() * sin).to(x.dtype)

    assert parts(check(call, heads(), heads(), *angles())) == [(1, 0), (1, 0)]


def test_norms_that_others_read_stay() -> None:
    assert parts(check(Read(), heads(), *angles())) == [(1, 0)]


def halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Pairs lie half the channels apart."""
    return apply_rotary_emb(x, (cos, sin), use_real_unbind_dim=-2, sequence_dim=1)


def other_sign(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([imaginary, -real], dim=-1).flatten(3)
    cos, sin = cos[None, :, None], sin[None, :, None]
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def of_others(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """What is turned is not what is added."""
    real, imaginary = x.sin().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    cos, sin = cos[None, :, None], sin[None, :, None]
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


@pytest.mark.parametrize("call", [halves, other_sign, of_others])
def test_other_embeddings_stay(call: Callable[..., Any]) -> None:
    assert not check(call, heads(), *angles())


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (
            FluxTransformerBlock,
            ["gelu_product", "modulated_norm", "modulated_norm_of_exact_sum"] * 2
            + ["rotated_heads"] * 2,
        ),
        (
            FluxSingleTransformerBlock,
            ["gelu_product", "joined_product", "modulated_norm"]
            + ["rotated_heads"] * 2,
        ),
    ],
)
def test_the_blocks_of_flux(block: type[nn.Module], expected: list[str]) -> None:
    width, image = HEADS * CHANNELS, 256
    module = block(width, HEADS, CHANNELS).eval()

    def call(*given: torch.Tensor) -> Any:
        rows, text, temb, *by = given
        return module(
            hidden_states=rows,
            encoder_hidden_states=text,
            temb=temb,
            image_rotary_emb=by,
        )

    given = [torch.randn(1, n, width) for n in (image, TEXT)]
    kernels = check(call, *given, torch.randn(1, width), *angles(image + TEXT))
    assert names(kernels) == sorted(expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("channels", [8, 64, 72, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens_first", [True, False])
@pytest.mark.parametrize("normed", [True, False])
def test_the_kernel(
    channels: int, dtype: torch.dtype, tokens_first: bool, normed: bool
) -> None:
    """Of heads that are parts of a wider product, against the operations one by one."""
    wide = torch.randn(BATCH, TEXT + IMAGE, 3 * HEADS * channels)
    parts = [
        x[..., : HEADS * channels].unflatten(-1, (HEADS, channels))
        for x in wide.to(dtype).split([TEXT, IMAGE], dim=1)
    ]
    by = [torch.randn(1, TEXT + IMAGE, 1, channels) for _ in range(2)]
    weights = [torch.rand(channels).to(dtype) for _ in parts] if normed else []
    if not tokens_first:
        parts, by = ([x.transpose(1, 2) for x in each] for each in (parts, by))
    found, expected = (
        rotated_heads(
            [x.to(device) for x in parts],
            [x.to(device) for x in weights],
            1e-6,
            *(x.to(device) for x in by),
        ).cpu()
        for device in ("cuda", "cpu")
    )
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    assert (found - expected).norm() < tolerance * expected.norm()
