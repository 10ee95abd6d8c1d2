"""Attention beside the products of a block that do not wait for it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from tests.ranks import run_ranks
from tests.runtime.cuda.shared_memory import SharedMemory
from xfuser_runtime.cuda import symmetric
from xfuser_runtime.cuda.overlap import put_attention_beside

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
    hidden = F.gelu(x @ held[3])
    return torch.cat([out.reshape(len(x), WIDTH), hidden], dim=1) @ held[4]


def parallel_block(x: torch.Tensor, *held: torch.Tensor) -> torch.Tensor:
    """Attention and a feed-forward layer that read the same rows: (S, C) to (S, C)."""
    return joined(x, exchanged(*queries_keys_values(x, held)), held)


def sequential_block(x: torch.Tensor, *held: torch.Tensor) -> torch.Tensor:
    """The feed-forward layer reads what attention made."""
    out = parallel_block(x, *held)
    return out + F.gelu(out @ held[3])[:, :WIDTH]


def stock(x: torch.Tensor, *held: torch.Tensor) -> torch.Tensor:
    q, k, v = (each.transpose(1, 2) for each in queries_keys_values(x, held))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return joined(x, out, held)


def names(graph: GraphModule) -> list[str]:
    wanted = ("symmetric_ulysses", "mm.default")
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


def test_products_that_wait_stay_behind() -> None:
    order, _, _ = on_ranks(sequential_block)
    assert order.index("symmetric_ulysses_end") < len(order) - 2
    assert order.count("mm") == 6


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
