"""Which tokens the keys of a block come from, on a block of our own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from porter.probe.provenance import KeyOrigins, runs_of


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_v = nn.Linear(4, 4)

    def forward(self, query: Any, context: Any) -> Any:
        key = self.to_v(context)[:, None]
        return F.scaled_dot_product_attention(query[:, None], key, key)[:, 0]


class _Block(nn.Module):
    """Joint keys: the context, each row with its own modulation, then the stream."""

    def __init__(self, order: list[int] | None = None) -> None:
        super().__init__()
        self.attn = _Attention()
        self.order = order

    def forward(self, x: Any, context: Any, temb: Any) -> Any:
        keys = torch.cat([context * temb[:, None], x * temb[:, None]], dim=1)
        if self.order is not None:
            keys = keys[:, self.order]
        return x + self.attn(x, keys)


def _origins(block: nn.Module) -> KeyOrigins:
    def model(swap: Any) -> None:
        torch.manual_seed(0)
        x, layers = torch.randn(2, 3, 4), [torch.randn(2, 5, 4)]
        x, temb = swap("x", x), swap("temb", torch.randn(2, 4))
        # What the body makes of a list before it calls the block keeps its origin.
        block(x, swap("layers", layers)[0] * 2, temb)

    return KeyOrigins(block, {("x", ""): 1}, {"x"}).run(model)


def test_keys_of_a_length_that_never_changes_are_found_with_their_dimension() -> None:
    found = _origins(_Block())
    assert runs_of(found.keys["attn"] or ()) == ((("layers", "0"), 5), (("x", ""), 3))
    assert runs_of(found.queries["attn"] or ()) == ((("x", ""), 3),)
    assert found.dims["layers", "0"] == 1


def test_keys_in_another_order_are_no_whole_streams() -> None:
    found = _origins(_Block(order=[1, 0, 2, 3, 4, 5, 6, 7])).keys["attn"]
    assert found is None or runs_of(found) is None


def test_the_model_is_left_without_gradients_switched_on() -> None:
    with torch.no_grad():
        _origins(_Block())
        assert not torch.is_grad_enabled()
