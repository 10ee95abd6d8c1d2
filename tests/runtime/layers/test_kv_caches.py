"""K/V caches of wrapped attention modules, and torch.compile around them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.ranks import run_ranks
from tests.runtime.layers.modules import (
    attention,
)
from tests.runtime.layers.session import (
    CAUGHT,
    GATE,
    TOKENS,
    enter,
    error,
    mixin_attention,
    start,
    tokens,
)
from xfuser_runtime.distributed.layout import Segment, TokenLayout
from xfuser_runtime.distributed.runtime_state import (
    RuntimeState,
    destroy_runtime_state,
)
from xfuser_runtime.layers import reset_kv_caches, wrap_attention


@pytest.fixture(autouse=True)
def _no_session() -> Iterator[None]:
    yield
    destroy_runtime_state()


class TestCaches:
    """One rank; each pass has tokens of its own, so stale rows are told from fresh ones."""

    def rows(self, layout: TokenLayout, patch: int) -> slice:
        ((first, last),) = layout.ranges("image", patch, 0)
        return slice(first, last)

    def run(
        self,
        module: nn.Module,
        state: RuntimeState,
        seed: int,
        *,
        step: int,
        patch: int | None,
        call: int = 0,
    ) -> torch.Tensor:
        state.start_pass(step=step, patch=patch)
        layout = enter(state, patches=2, patch=patch, call=call)
        x = tokens(seed) if patch is None else tokens(seed)[:, self.rows(layout, patch)]
        with torch.no_grad():
            return module(x)

    def expected(self, fresh: int, stale: int, patch: int, make: Any) -> torch.Tensor:
        """Patch rows of the module on tokens that are fresh in the patch, stale elsewhere.

        Right for one layer: its keys are functions of the tokens alone.
        """
        layout = TokenLayout((Segment("image", TOKENS, follows_latents=True),), 2, 1)
        mixed, here = tokens(stale).clone(), self.rows(layout, patch)
        mixed[:, here] = tokens(fresh)[:, here]
        with torch.no_grad():
            return make()(mixed)[:, here]

    @pytest.mark.parametrize("make", [attention, mixin_attention])
    def test_patch_attends_to_stale_rows(self, make: Any) -> None:
        state = start()
        module = wrap_attention(make(), ("image",), ("image",))
        self.run(module, state, 1, step=0, patch=None)
        found = self.run(module, state, 2, step=1, patch=0)
        assert error(found, self.expected(2, 1, 0, make)) <= GATE
        # Sabotage twin: the very same check fails for a patch that sees fresh rows only.
        assert error(found, self.expected(2, 2, 0, make)) >= CAUGHT * GATE

    def test_transformer_calls_never_share(self) -> None:
        state = start()
        module = wrap_attention(attention(), ("image",), ("image",))
        self.run(module, state, 1, step=0, patch=None, call=0)
        self.run(module, state, 2, step=0, patch=None, call=1)
        first = self.run(module, state, 3, step=1, patch=0, call=0)
        second = self.run(module, state, 4, step=1, patch=0, call=1)
        assert error(first, self.expected(3, 1, 0, attention)) <= GATE
        assert error(second, self.expected(4, 2, 0, attention)) <= GATE
        assert error(first, self.expected(3, 2, 0, attention)) >= CAUGHT * GATE

    def test_two_uses_in_one_forward_never_share(self) -> None:
        state = start()
        module = wrap_attention(attention(), ("image",), ("image",))
        region = None
        for seed in (1, 2):
            if region is None:
                self.run(module, state, seed, step=0, patch=None)
                region = state.region
            else:
                state.region = region
                module(tokens(seed))
        site = vars(module)["_xfuser_attention_site"]
        assert sorted(site.caches._held) == [(0, 0), (0, 1)]

    def test_a_new_run_without_warm_up_starts_empty(self) -> None:
        state = start()
        module = wrap_attention(attention(), ("image",), ("image",))

        def run() -> list[torch.Tensor]:
            return [
                self.run(module, state, 10 + patch, step=0, patch=patch)
                for patch in range(2)
            ]

        first, second = run(), run()
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_reset_forgets_the_rows_and_keeps_their_memory(self) -> None:
        state = start()
        model = nn.ModuleList([wrap_attention(attention(), ("image",), ("image",))])
        self.run(model[0], state, 1, step=0, patch=None)
        ((_, cache),) = vars(model[0])["_xfuser_attention_site"].caches.items()
        address = cache._key.data_ptr()
        assert cache.filled == (0, 1)
        reset_kv_caches(model)
        assert cache.filled == ()
        self.run(model[0], state, 2, step=0, patch=None)
        assert cache.filled == (0, 1) and cache._key.data_ptr() == address

    def test_inference_mode_may_come_and_go(self) -> None:
        state = start()
        module = wrap_attention(attention(), ("image",), ("image",))
        for inference in (True, False, True):
            with torch.inference_mode(inference):
                self.run(module, state, 1, step=0, patch=None)
                found = self.run(module, state, 2, step=1, patch=0)
            assert error(found, self.expected(2, 1, 0, attention)) <= GATE


def test_compiles_in_one_graph_under_ulysses() -> None:
    def body(rank: int) -> tuple[torch.Tensor, int]:
        state = start(2)
        module = wrap_attention(attention(), ("image",), ("image",))
        layout = enter(state)
        ((first, last),) = layout.ranges("image", None, rank)
        graphs = []

        def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(module.processor, backend=count, fullgraph=True)
        with torch.no_grad():
            for seed in (0, 1):
                enter(state)  # a region object of its own for every pass
                found = compiled(module, tokens(seed)[:, first:last])
        return found, len(graphs)

    results = run_ranks(body, 2, timeout=120)
    assert [graphs for _, graphs in results] == [1, 1]
    found = torch.cat([rows for rows, _ in results], dim=1)
    assert error(found, attention()(tokens(1))) <= GATE


@pytest.mark.parametrize("mode", [(1, 2), (2, 2)])
def test_compiles_with_the_ring_and_the_cache(mode: tuple[int, int]) -> None:
    """The ring and the cache are one operation of one graph, made once for all passes."""

    def body(rank: int) -> list[torch.Tensor]:
        state = start(*mode)
        module = wrap_attention(attention(), ("image",), ("image",))
        graphs = []

        def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(module.processor, backend=count, fullgraph=True)
        found, made = [], []
        with torch.no_grad():
            for step in range(3):
                state.start_pass(step=step, patch=None)
                layout = enter(state, patches=2)
                spans = layout.ranges("image", None, rank)
                rows = [tokens(step)[:, first:last] for first, last in spans]
                found.append(compiled(module, torch.cat(rows, dim=1)))
                made.append(len(graphs))
        assert made == [1, 1, 1]
        return found

    ranks = mode[0] * mode[1]
    results = run_ranks(body, ranks, timeout=120)
    layout = TokenLayout((Segment("image", TOKENS, follows_latents=True),), 2, ranks)
    order = torch.tensor(
        [
            row
            for rank in range(ranks)
            for first, last in layout.ranges("image", None, rank)
            for row in range(first, last)
        ]
    )
    for step in range(3):
        found = torch.cat([result[step] for result in results], dim=1)
        with torch.no_grad():
            assert error(found, attention()(tokens(step))[:, order]) <= GATE
