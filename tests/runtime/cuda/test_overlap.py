"""Attention beside the products of a block that do not wait for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from tests.ranks import run_ranks
from tests.runtime.cuda.shared_memory import SharedMemory
from xfuser_runtime.cuda import products, symmetric
from xfuser_runtime.cuda.overlap import put_attention_beside
from xfuser_runtime.cuda.passes import OPTIONS

ROWS, HEADS, CHANNELS = 6, 4, 8
WIDTH = HEADS * CHANNELS


def weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(WIDTH, WIDTH)] * 3 + [(WIDTH, 2 * WIDTH), (3 * WIDTH, WIDTH)]
    return [torch.randn(s, generator=generator).double() / s[0] ** 0.5 for s in shapes]


def queries_keys_values(
    x: torch.Tensor, held: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """(1, S, H, D) each."""
    return [
        (x @ w).view(1, len(x), HEADS, CHANNELS) * (1 + index)
        for index, w in enumerate(held[:3])
    ]


def exchanged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    lengths = [q.shape[1]] * dist.get_world_size()
    return symmetric.attention(
        q,
        k,
        v,
        query_lengths=lengths,
        key_lengths=lengths,
        is_causal=False,
        scale=None,
    )


def joined(
    x: torch.Tensor, out: torch.Tensor, held: Sequence[torch.Tensor]
) -> torch.Tensor:
    hidden = F.gelu(x @ held[3], approximate="tanh")
    return torch.cat([out.reshape(len(x), WIDTH), hidden], dim=1) @ held[4]


def parallel_block(x: torch.Tensor, *held: torch.Tensor) -> torch.Tensor:
    """Attention and a feed-forward layer that read the same rows: (S, C) to (S, C)."""
    return joined(x, exchanged(*queries_keys_values(x, held)), held)


def block_of_kernels(x: torch.Tensor, *held: torch.Tensor) -> torch.Tensor:
    """`parallel_block` with the operations that GPUs get."""
    out = exchanged(*queries_keys_values(x, held)).reshape(len(x), WIDTH)
    zeros = x.new_zeros(2 * WIDTH)
    hidden = torch.ops.xfuser_kernels.gelu_product(x, held[3].t(), zeros)
    return torch.ops.xfuser_kernels.joined_product(out, hidden, held[4].t(), None)


def sequential_block(x: torch.Tensor, *held: torch.Tensor) -> torch.Tensor:
    """The feed-forward layer reads what attention made."""
    out = parallel_block(x, *held)
    return out + F.gelu(out @ held[3], approximate="tanh")[:, :WIDTH]


def stock(x: torch.Tensor, *held: torch.Tensor) -> torch.Tensor:
    q, k, v = (each.transpose(1, 2) for each in queries_keys_values(x, held))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return joined(x, out, held)


def names(graph: GraphModule) -> list[str]:
    wanted = ("symmetric_ulysses", "mm.default", "_product")
    found = [str(node.target) for node in graph.graph.nodes]
    return [name.split(".")[1] for name in found if any(w in name for w in wanted)]


def on_ranks(block, degree: int = 2):  # type: ignore[no-untyped-def]
    """Order of products and attention in the rewritten graph, and the output of all rows."""
    held = weights()
    x = torch.randn(ROWS * degree, WIDTH, generator=torch.Generator().manual_seed(1))
    x = x.double()
    memory = SharedMemory(degree, 4096, torch.float64)

    def rank_main(rank: int) -> tuple[list[str], torch.Tensor]:
        memory.enter()
        own = x[rank * ROWS : (rank + 1) * ROWS]
        graph = make_fx(block)(own, *held)
        put_attention_beside(graph.graph)
        graph.graph.lint()
        graph.recompile()
        return names(graph), graph(own, *held)

    found = run_ranks(rank_main, degree)
    return found[0][0], torch.cat([rows for _, rows in found]), stock(x, *held)


def test_a_product_that_does_not_wait_stands_between_begin_and_end() -> None:
    order, found, expected = on_ranks(parallel_block)
    assert order == [
        *["mm"] * 3,
        "symmetric_ulysses_begin",
        "mm",
        "symmetric_ulysses_end",
        "mm",
    ]
    torch.testing.assert_close(found, expected)


def test_a_product_with_its_gelu_stands_between_begin_and_end() -> None:
    order, found, expected = on_ranks(block_of_kernels)
    assert order == [
        *["mm"] * 3,
        "symmetric_ulysses_begin",
        "gelu_product",
        "symmetric_ulysses_end",
        "joined_product",
    ]
    torch.testing.assert_close(found, expected)


def test_products_that_wait_stay_behind() -> None:
    order, _, _ = on_ranks(sequential_block)
    assert order.index("symmetric_ulysses_end") < len(order) - 2
    assert order.count("mm") == 6


class Block(nn.Module):
    """Attention and a feed-forward layer that read the same rows, as diffusers writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm_q, self.norm_k = nn.RMSNorm(CHANNELS, 1e-6), nn.RMSNorm(
            CHANNELS, 1e-6
        )
        self.up, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(
        self,
        x: torch.Tensor,
        temb: torch.Tensor,
        by: tuple[torch.Tensor, torch.Tensor],
        attend: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        scale, shift = temb.chunk(2, dim=1)
        rows = F.layer_norm(x, (WIDTH,)) * (1 + scale[:, None]) + shift[:, None]
        hidden = F.gelu(self.up(rows), approximate="tanh")
        projections = (self.to_q, self.to_k, self.to_v)
        q, k, v = (f(rows).unflatten(-1, (HEADS, -1)) for f in projections)
        q, k = (
            apply_rotary_emb(norm(heads), by, sequence_dim=1)
            for norm, heads in ((self.norm_q, q), (self.norm_k, k))
        )
        joined = torch.cat([attend(q, k, v).flatten(2), hidden], dim=2)
        return x + self.out(joined)


def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads).transpose(1, 2)


def test_all_passes_on_a_compiled_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, by the compiler: what each operation reads is there when it reads it."""
    monkeypatch.setattr(products, "MIN_COLUMNS", WIDTH)
    torch.manual_seed(0)
    rows, degree = products.MIN_ROWS, 2
    block, memory = Block().eval(), SharedMemory(degree, 2**16, torch.float32)
    x, temb = torch.randn(1, degree * rows, WIDTH), torch.randn(1, 2 * WIDTH)
    by = torch.randn(degree * rows, CHANNELS), torch.randn(degree * rows, CHANNELS)

    @torch.no_grad()
    def rank_main(rank: int) -> tuple[list[str], torch.Tensor]:
        memory.enter()
        own = slice(rank * rows, (rank + 1) * rows)
        compiled = torch.compile(block, options=OPTIONS, fullgraph=True)
        arguments = x[:, own].clone(), temb, tuple(each[own] for each in by), exchanged
        found, (code,) = run_and_get_code(compiled, *arguments)
        calls = r"^ +(?:\w+ = )?torch\.ops\.xfuser_\w+\.(\w+)\.default\("
        return re.findall(calls, code, re.MULTILINE), found

    results = run_ranks(rank_main, degree, timeout=120)
    with torch.no_grad():
        expected = block(x, temb, by, whole)
    torch.testing.assert_close(torch.cat([out for _, out in results], 1), expected)
    assert results[0][0] == [
        "modulated_norm",
        "stacked_product",
        "rotated_heads",
        "rotated_heads",
        "symmetric_ulysses_begin",
        "gelu_product",
        "symmetric_ulysses_end",
        "joined_product",
    ]


def attention_only(x: torch.Tensor, *held: torch.Tensor) -> torch.Tensor:
    out = exchanged(*queries_keys_values(x, held))
    return out.view(len(x), WIDTH) @ held[0]


def test_without_such_a_product_the_call_stays_one() -> None:
    order, _, _ = on_ranks(attention_only)
    assert order == ["mm", "mm", "mm", "symmetric_ulysses", "mm"]


def test_copies_of_the_inputs_are_refused() -> None:
    """What travels is read until the end: memory that is given back before would be wrong."""
    memory = SharedMemory(2, 4096, torch.float64)

    def rank_main(rank: int) -> None:
        memory.enter()
        qkv = [torch.randn(1, ROWS, HEADS, CHANNELS).double() for _ in range(3)]
        begin = torch.ops.xfuser_runtime.symmetric_ulysses_begin
        end = torch.ops.xfuser_runtime.symmetric_ulysses_end
        arguments = (*qkv, [ROWS] * 2, [ROWS] * 2, False, None, [])
        end(begin(*arguments), *qkv)
        result = begin(*arguments)
        with pytest.raises(RuntimeError, match="expected the inputs"):
            end(result, qkv[0].clone(), *qkv[1:])

    run_ranks(rank_main, 2)
