"""Where the keys of an attention call come from, on blocks of our own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from porter.probe.provenance import KeyOrigins

TEXT, TOKENS, WIDTH = 2, 5, 8


class Joined(nn.Module):
    """Text before tokens; position embeddings are written into the tokens' rows."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Module()
        self.attention.forward = self._attend  # type: ignore[method-assign]
        self.project = nn.Linear(WIDTH, WIDTH)

    def _attend(self, text: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        joined = self.project(torch.cat([text, tokens], dim=1))[:, None]
        query, key, value = joined.clone(), joined.clone(), joined
        positions = torch.arange(1.0, TOKENS + 1)[:, None]
        query[:, :, TEXT:] = query[:, :, TEXT:] ** 2 * positions
        key[:, :, TEXT:] = key[:, :, TEXT:] ** 2 * positions
        return F.scaled_dot_product_attention(query, key, value)[:, 0]

    def forward(self, text: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.attention(text, tokens)


def test_rows_that_are_written_in_place_keep_their_origins() -> None:
    block = Joined()
    values = {
        "text": torch.randn(1, TEXT, WIDTH),
        "tokens": torch.randn(1, TOKENS, WIDTH),
    }

    def model(swap: Any) -> Any:
        return block(**{name: swap(name, value) for name, value in values.items()})

    axes = {("text", ""): 1, ("tokens", ""): 1}
    found = KeyOrigins(block, axes, set(values)).run(model)
    expected = [(("text", ""), row) for row in range(TEXT)]
    expected += [(("tokens", ""), row) for row in range(TOKENS)]
    assert found.keys["attention"] == tuple(expected)
    assert found.queries["attention"] == tuple(expected)


class Context(nn.Module):
    """Tokens look at two parts of a context, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Module()
        self.attention.forward = self._attend  # type: ignore[method-assign]
        self.project = nn.Linear(WIDTH, WIDTH, bias=False)

    def _attend(self, context: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        query = self.project(tokens)[:, None]
        found = torch.zeros_like(tokens)
        for part in (context[:, :TEXT], context[:, TEXT:]):
            keys = self.project(part)[:, None]
            found = found + F.scaled_dot_product_attention(query, keys, keys)[:, 0]
        return found

    def forward(self, context: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.attention(context, tokens)


def origins_of_context(
    axes: dict[tuple[str, str], int], carried: set[str] | None = None
) -> KeyOrigins:
    block = Context()
    values = {
        "context": torch.randn(1, TEXT + 3, WIDTH),
        "tokens": torch.randn(1, TOKENS, WIDTH),
    }
    values["context"][:, -1] = 0  # padding

    def model(swap: Any) -> Any:
        return block(**{name: swap(name, value) for name, value in values.items()})

    return KeyOrigins(block, axes, carried or {"tokens"}).run(model)


def test_parts_of_a_context_of_one_length_are_no_streams() -> None:
    assert origins_of_context({("tokens", ""): 1}).keys["attention"] == ()


def test_parts_of_a_context_that_the_loop_does_not_carry_are_named() -> None:
    found = origins_of_context({("tokens", ""): 1, ("context", ""): 1})
    assert found.keys["attention"] == ()
    assert found.contexts == {"attention": {"context"}}


def test_parts_of_a_context_that_the_loop_carries_are_unclear() -> None:
    axes = {("tokens", ""): 1, ("context", ""): 1}
    found = origins_of_context(axes, {"tokens", "context"})
    assert found.keys["attention"] is None
    assert not found.contexts
