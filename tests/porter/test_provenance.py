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
