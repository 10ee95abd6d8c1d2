"""Wrapped attention modules: parity on ranks, caches, and everything that upstream still does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn

from tests.ranks import RankError, run_ranks
from tests.runtime.layers.modules import (
    WIDTH,
    HeadsFirstProcessor,
    MixinAttention,
    OtherProcessor,
    OwnAttention,
    TinyModel,
    WeightedProcessor,
    attention,
    xFuserHeadsFirstProcessorWrapper,
)
from xfuser_runtime.attention import parallel_attention
from xfuser_runtime.config import EngineConfig, ParallelConfig, RuntimeConfig
from xfuser_runtime.distributed.layout import Segment, TokenLayout
from xfuser_runtime.distributed.parallel_state import (
    get_sp_group,
    initialize_model_parallel,
)
from xfuser_runtime.distributed.runtime_state import (
    RuntimeState,
    destroy_runtime_state,
    initialize_runtime_state,
)
from xfuser_runtime.layers import attention as attention_layer
from xfuser_runtime.layers import reset_kv_caches, wrap_attention

GATE, CAUGHT = 5e-6, 30.0
TOKENS = 11


def start(ulysses: int = 1, ring: int = 1, backend: str | None = None) -> RuntimeState:
    config = ParallelConfig(ulysses_degree=ulysses, ring_degree=ring)
    if ulysses * ring > 1:
        initialize_model_parallel(config)
    return initialize_runtime_state(
        EngineConfig(
            parallel_config=config,
            runtime_config=RuntimeConfig(attention_backend=backend),
        )
    )


def enter(
    state: RuntimeState, patches: int = 1, patch: int | None = None, call: int = 0
) -> TokenLayout:
    """Enter a block region as the transformer wrapper does, with a fresh region object."""
    layout = TokenLayout(
        (Segment("image", TOKENS, split_by_patch=True),),
        patches,
        get_sp_group().world_size,
    )
    state.call_index = call
    state.region = SimpleNamespace(layout=layout, patch=patch, call_index=call)
    return layout


@pytest.fixture(autouse=True)
def _no_session() -> Iterator[None]:
    yield
    destroy_runtime_state()


def tokens(seed: int = 0, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, TOKENS, WIDTH, generator=generator)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm())


def mixin_attention() -> MixinAttention:
    torch.manual_seed(1)
    return MixinAttention().eval()


def parallel_error(
    make: Callable[[], nn.Module],
    mode: tuple[int, int],
    sabotage: Callable[[], None] | None = None,
    **kwargs: Any,
) -> float:
    def body(rank: int) -> torch.Tensor:
        state = start(*mode)
        if sabotage is not None:
            sabotage()
        module = wrap_attention(make(), ("image",), ("image",))
        layout = enter(state)
        ((first, last),) = layout.ranges("image", None, get_sp_group().rank_in_group)
        given = {k: v[..., first:last] for k, v in kwargs.items()}
        with torch.no_grad():
            return module(tokens()[:, first:last], **given)

    found = torch.cat(run_ranks(body, mode[0] * mode[1]), dim=1)
    with torch.no_grad():
        return error(found, make()(tokens(), **kwargs))


MASK = (torch.arange(TOKENS) % 3 > 0).expand(2, 1, 1, TOKENS).clone()
MASK[1] = MASK[0].roll(1)


@pytest.mark.parametrize("mode", [(2, 1), (1, 2), (2, 2)])
def test_matches_the_module_on_whole_tokens(mode: tuple[int, int]) -> None:
    assert parallel_error(attention, mode) <= GATE
    assert parallel_error(attention, mode, attention_mask=MASK) <= GATE
    assert parallel_error(mixin_attention, mode) <= GATE


def call_upstream() -> None:
    """The region is not seen: attention over this rank's keys alone."""
    attention_layer.xFuserAttentionBaseWrapper._parallel_call = (
        lambda *args, **kwargs: None
    )


def drop_mask() -> None:
    attention_layer.parallel_attention = lambda *args, **kwargs: parallel_attention(
        *args, **(kwargs | {"attn_mask": None})
    )


def test_sabotage_is_caught() -> None:
    least = CAUGHT * GATE
    assert parallel_error(attention, (2, 1), call_upstream) >= least
    assert parallel_error(mixin_attention, (1, 2), call_upstream) >= least
    assert parallel_error(attention, (2, 1), drop_mask, attention_mask=MASK) >= least


class TestAsUpstream:
    def test_outside_of_a_region_it_is_upstreams_call(self) -> None:
        for make in (attention, mixin_attention):
            expected = make()(tokens())
            module = wrap_attention(make(), ("image",), ("image",))
            assert torch.equal(module(tokens()), expected)
            state = start()
            assert torch.equal(module(tokens()), expected)
            enter(state)
            assert torch.equal(module(tokens()), expected)
            destroy_runtime_state()

    def test_same_object_class_and_weights(self) -> None:
        module = attention()
        keys, first = list(module.state_dict()), module.to_q
        assert wrap_attention(module, ("image",), ("image",)) is module
        assert isinstance(module, Attention) and module.__class__ is Attention
        assert list(module.state_dict()) == keys and module.to_q is first
        assert type(module).__name__ == "xFuserAttentionWrapper"
        wrapped = type(module)
        wrap_attention(module, ("image",), ("image",))
        assert type(module) is wrapped

    def test_hooks_installed_before_and_after_run(self) -> None:
        module, seen = attention(), []
        module.register_forward_hook(lambda *args: seen.append("before"))
        wrap_attention(module, ("image",), ("image",))
        module.register_forward_hook(lambda *args: seen.append("after"))
        module(tokens())
        assert seen == ["before", "after"]

    def test_an_accelerate_hook_goes_on_working(self) -> None:
        from accelerate.hooks import ModelHook, add_hook_to_module

        class Doubles(ModelHook):
            def post_forward(self, module: nn.Module, output: torch.Tensor) -> Any:
                return 2 * output

        expected = 2 * attention()(tokens())
        module = attention()
        add_hook_to_module(module, Doubles())
        wrap_attention(module, ("image",), ("image",))
        assert torch.equal(module(tokens()), expected)

    def test_deepcopy_shares_nothing(self) -> None:
        state = start()
        module = wrap_attention(attention(), ("image",), ("image",))
        enter(state, patches=2)
        module(tokens())
        twin = copy.deepcopy(module)
        assert type(twin) is type(module)
        assert twin.to_q.weight is not module.to_q.weight
        site, other = (vars(m)["_xfuser_attention_site"] for m in (module, twin))
        assert site.caches._held and not other.caches._held
        assert other.key_segments == ("image",)
        assert torch.equal(twin(tokens()), module(tokens()))

    def test_save_then_stock_load(self, tmp_path: Path) -> None:
        model = TinyModel().eval()
        expected = model(tokens())
        for module in (model.attn1, model.attn2):
            wrap_attention(module, ("image",), ("image",))
        model.save_pretrained(tmp_path)
        loaded = TinyModel.from_pretrained(tmp_path).eval()
        assert type(loaded.attn1) is Attention
        assert torch.equal(loaded(tokens()), expected)


class TestProcessors:
    def test_every_way_to_set_one(self) -> None:
        model = TinyModel().eval()
        for module in (model.attn1, model.attn2):
            wrap_attention(module, ("image",), ("image",))
        for assign in (
            lambda p: model.set_attn_processor(p),
            lambda p: model.set_attn_processor(dict.fromkeys(model.attn_processors, p)),
            lambda p: model.attn1.set_processor(p),
            lambda p: setattr(model.attn1, "processor", p),
        ):
            given = HeadsFirstProcessor(0.3)
            assign(given)
            held = model.attn1.processor
            assert type(held) is xFuserHeadsFirstProcessorWrapper
            assert held.factor == 0.3 and type(given) is HeadsFirstProcessor

    def test_a_ported_one_stays_as_it_is(self) -> None:
        module = wrap_attention(attention(), ("image",), ("image",))
        held = module.processor
        module.set_processor(held)
        assert module.processor is held

    def test_one_with_weights_is_changed_in_place(self) -> None:
        module = mixin_attention()
        held, keys = module.processor, list(module.state_dict())
        wrap_attention(module, ("image",), ("image",))
        assert module.processor is held and isinstance(held, WeightedProcessor)
        assert list(module.state_dict()) == keys
        given = WeightedProcessor()
        module.set_processor(given)
        assert module.processor is given
        assert list(module.state_dict()) == keys

    @pytest.mark.parametrize("given", [OtherProcessor(), AttnProcessor2_0()])
    def test_one_that_is_not_ported_is_refused(self, given: Any) -> None:
        message = f"Attention Processor class {type(given).__name__} is not supported by xFuser"
        module = attention()
        module.set_processor(given)
        with pytest.raises(ValueError, match=message):
            wrap_attention(module, ("image",), ("image",))
        assert type(module) is Attention and module.processor is given
        for make, setter in (
            (attention, lambda m: m.set_processor(given)),
            (attention, lambda m: setattr(m, "processor", given)),
            (mixin_attention, lambda m: setattr(m, "processor", given)),
        ):
            module = wrap_attention(make(), ("image",), ("image",))
            held = module.processor
            with pytest.raises(ValueError, match=message):
                setter(module)
            assert module.processor is held

    def test_a_module_without_processor_is_refused(self) -> None:
        with pytest.raises(
            ValueError, match="Layer OwnAttention is not supported by xFus"
        ):
            wrap_attention(OwnAttention(), ("image",), ("image",))

    def test_diffusers_backend_of_a_processor(self) -> None:
        def body(rank: int) -> None:
            state = start(2)
            module = wrap_attention(mixin_attention(), ("image",), ("image",))
            enter(state)
            x = torch.randn(1, 6 - rank, 3, 8)
            module.dispatch_attention_fn(x, x, x, backend="_native_math")
            with pytest.raises(ValueError, match="diffusers' attention backend 'flex'"):
                module.dispatch_attention_fn(x, x, x, backend="flex")
            with pytest.raises(ValueError, match=r"kernel options \['window_size'\]"):
                module.dispatch_attention_fn(
                    x, x, x, attention_kwargs={"window_size": 4}
                )
            with pytest.raises(ValueError, match="dropout_p 0.1 in a parallel"):
                module.dispatch_attention_fn(x, x, x, dropout_p=0.1)

        run_ranks(body, 2)

    def test_configured_kernel_is_used(self) -> None:
        """Named in the configuration it runs, also where torch would do; unknown is refused."""
        state = start(backend="sdpa_math")
        module = wrap_attention(attention(), ("image",), ("image",))
        enter(state)
        assert error(module(tokens()), attention()(tokens())) <= GATE
        state = start(backend="sdpa_flash")
        enter(state)
        with pytest.raises(ValueError, match="'sdpa_flash' cannot run"):
            module(tokens())


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
        layout = TokenLayout((Segment("image", TOKENS, split_by_patch=True),), 2, 1)
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

    def test_reset_frees_the_caches(self) -> None:
        state = start()
        model = nn.ModuleList([wrap_attention(attention(), ("image",), ("image",))])
        self.run(model[0], state, 1, step=0, patch=None)
        reset_kv_caches(model)
        assert not vars(model[0])["_xfuser_attention_site"].caches._held


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
def test_compiles_around_the_ring_and_the_cache(mode: tuple[int, int]) -> None:
    """The ring and the cache run between two graphs; nothing is compiled again per pass."""

    def body(rank: int) -> list[torch.Tensor]:
        state = start(*mode)
        module = wrap_attention(attention(), ("image",), ("image",))
        graphs = []

        def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(module.processor, backend=count)
        found, made = [], []
        with torch.no_grad():
            for step in range(3):
                state.start_pass(step=step, patch=None)
                layout = enter(state, patches=2)
                spans = layout.ranges("image", None, rank)
                rows = [tokens(step)[:, first:last] for first, last in spans]
                found.append(compiled(module, torch.cat(rows, dim=1)))
                made.append(len(graphs))
        assert made[1] == made[2]
        return found

    ranks = mode[0] * mode[1]
    results = run_ranks(body, ranks, timeout=120)
    layout = TokenLayout((Segment("image", TOKENS, split_by_patch=True),), 2, ranks)
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


def test_wrong_rows_are_refused() -> None:
    def body(rank: int) -> None:
        state = start(2)
        module = wrap_attention(attention(), ("image",), ("image",))
        enter(state)
        module(tokens())

    with pytest.raises(RankError, match="11 query rows on shard 0, expected 6"):
        run_ranks(body, 2)
