"""Projections of the same rows: laid out in memory, found in a graph, made as one product."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from xfuser_runtime.cuda import stacked
from xfuser_runtime.cuda.passes import BlockPass
from xfuser_runtime.cuda.stacked import Layout, lay_out, stack_products

STACKED = torch.ops.xfuser_kernels.stacked_product.default


class Projections(nn.Module):
    """An attention module as diffusers writes them, without the attention."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.to_q = nn.Linear(8, 6, bias=bias)
        self.to_k = nn.Linear(8, 6, bias=bias)
        self.to_v = nn.Linear(8, 6, bias=bias)
        self.to_out = nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_out(self.to_q(x) * self.to_k(x) + self.to_v(x))


def graph_of(module: nn.Module, x: torch.Tensor) -> GraphModule:
    """What a compiled block hands to its pass: parameters are arguments."""
    names, values = zip(*module.named_parameters(), strict=True)

    def call(values: tuple[torch.Tensor, ...], x: torch.Tensor) -> torch.Tensor:
        held = dict(zip(names, values, strict=True))
        found: torch.Tensor = torch.func.functional_call(module, held, (x,))
        return found

    with torch.no_grad():
        return make_fx(call, tracing_mode="fake")(values, x)


def run(graph: GraphModule, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = graph(tuple(module.parameters()), x)
    return found


def count(graph: GraphModule) -> int:
    return sum(node.target is STACKED for node in graph.graph.nodes)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("laid_out", [True, False])
def test_one_product_for_three(bias: bool, laid_out: bool) -> None:
    torch.manual_seed(0)
    module, x = Projections(bias), torch.randn(2, 5, 8)
    expected = module(x)
    if laid_out:
        lay_out(module)
    assert torch.equal(module(x), expected)
    graph = graph_of(module, x)
    stack_products(graph.graph)
    graph.recompile()
    assert count(graph) == 1
    torch.testing.assert_close(run(graph, module, x), expected)


def test_mixed_up_parts_are_seen() -> None:
    """A sabotage: query and key in each other's place."""
    torch.manual_seed(0)
    module, x = Projections(), torch.randn(2, 5, 8)
    expected = module(x)
    graph = graph_of(module, x)
    stack_products(graph.graph)
    (node,) = (n for n in graph.graph.nodes if n.target is STACKED)
    rows, (first, *others, last), biases = node.args
    node.args = (rows, [last, *others, first], biases)
    graph.recompile()
    assert (run(graph, module, x) - expected).norm() > 1e-2 * expected.norm()


def test_other_rows_or_another_size_stay_apart() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(8, 6), nn.Linear(8, 6)
            self.wide = nn.Linear(8, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(x) + self.other(x.relu()) + self.wide(x)[..., :6]

    graph = graph_of(Two(), torch.randn(5, 8))
    stack_products(graph.graph)
    assert count(graph) == 0


def test_weights_lie_one_after_the_other() -> None:
    module = Projections()
    before = {name: x.clone() for name, x in module.state_dict().items()}
    lay_out(module)
    q, k, v = module.to_q.weight, module.to_k.weight, module.to_v.weight
    assert k.data_ptr() - q.data_ptr() == v.data_ptr() - k.data_ptr() == q.numel() * 4
    address = q.data_ptr()
    lay_out(module)
    assert module.to_q.weight is q and q.data_ptr() == address
    for name, x in module.state_dict().items():
        assert torch.equal(x, before[name])


def test_weights_that_lie_so_are_saved_as_ever(tmp_path: Path) -> None:
    module = Projections()
    lay_out(module)
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    for name, x in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(x, module.state_dict()[name])


class Adapted(nn.Linear):
    """A layer that computes more than its weight says."""


def replaced(module: Projections) -> None:
    module.to_k = Adapted(8, 6)


def of_another_type(module: Projections) -> None:
    module.to_k.double()


def shared(module: Projections) -> None:
    module.to_v.weight = module.to_k.weight = module.to_q.weight


@pytest.mark.parametrize("change", [replaced, of_another_type, shared])
def test_other_layers_stay_where_they_are(
    change: Callable[[Projections], None],
) -> None:
    module = Projections()
    change(module)
    addresses = [x.data_ptr() for x in module.parameters()]
    lay_out(module)
    assert [x.data_ptr() for x in module.parameters()] == addresses


def test_what_has_moved_is_laid_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    module = Projections()
    layout = Layout(module)
    monkeypatch.setattr(stacked, "lay_out", calls.append)
    layout.keep(module)
    assert calls == []  # on CPU, where nothing is gained
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    layout.keep(module)
    layout.keep(module)
    assert calls == [module]
    module.to_q.weight.data = module.to_q.weight.data.clone()
    layout.keep(module)
    assert calls == [module, module]


def test_the_pass_has_a_key_for_the_cache_of_compiled_code() -> None:
    assert BlockPass().uuid() == BlockPass().uuid()
    assert pickle.dumps(BlockPass().uuid())
