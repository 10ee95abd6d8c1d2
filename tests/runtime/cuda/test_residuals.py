"""Gated residual sums as one operation where no compiler is, and what is left of the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.runtime.cuda.rewritten import calls_of, check, names, rewritten

pytestmark = pytest.mark.usefixtures("inference")

X, Y, GATE = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 8)


def gate_first(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return x + gate.unsqueeze(1) * y.sin()


def gate_last(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    y = y.sin() * gate[:, None]
    return y + x


def twice(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return gate_last(gate_first(x, y, gate), y, gate)


@pytest.mark.parametrize(
    ("call", "count"), [(gate_first, 1), (gate_last, 1), (twice, 2)]
)
def test_one_operation(call: Callable[..., Any], count: int) -> None:
    targets = targets_of(call, X, Y, GATE)
    assert targets.count("aten.addcmul.default") == count
    assert not {"add", "mul"} & set(targets)
    assert "aten.addcmul.default" not in targets_of(call, X, Y, GATE, for_compiler=True)


def read_again(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    y = gate[:, None] * y
    return (x + y) * y


def by_a_number(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return x + 2 * y


def wider(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return x[:, :1] + gate[:, None] * y


def written(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    x, gated = x.clone(), gate[:, None] * y
    y.mul_(1.0)
    return x + gated


@pytest.mark.parametrize("call", [read_again, by_a_number, wider, written])
def test_others_stay(call: Callable[..., Any]) -> None:
    assert "aten.addcmul.default" not in targets_of(call, X, Y, GATE)


def targets_of(
    call: Callable[..., Any], *arguments: torch.Tensor, for_compiler: bool = False
) -> list[str]:
    """What the rewritten call calls; it gives what the call gives."""
    return [
        (
            str(target)
            if isinstance(target, torch._ops.OpOverload)
            else getattr(target, "__name__", str(target))
        )
        for target in (
            node.target
            for node in calls_of(call, *arguments, for_compiler=for_compiler)
        )
    ]


def of_what_is_computed(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x.sin(), (8,)) * (1 + gate[:, None]) + gate[:, None]


def test_norms_of_what_the_block_computes() -> None:
    kernels = check(of_what_is_computed, X, GATE, for_compiler=False)
    assert names(kernels) == ["modulated_norm"]
    assert "layer_norm" not in targets_of(of_what_is_computed, X, GATE)


def draws(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    torch.rand(1)
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def test_what_nobody_reads_goes_and_what_draws_stays() -> None:
    weight, bias = torch.randn(16, 8), torch.randn(16)
    made, _ = rewritten(draws, for_compiler=False)
    for call in (draws, made):
        torch.manual_seed(0)
        call(X, weight, bias)
        assert torch.rand(1) != torch.rand(
            1, generator=torch.Generator().manual_seed(0)
        )
    targets = targets_of(draws, X, weight, bias)
    assert "linear" not in targets and "rand" in targets
