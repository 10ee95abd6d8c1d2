"""Wrapped attention modules: parity on ranks, caches, and everything that upstream still does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0
from torch import nn

from tests.ranks import RankError, run_ranks
from tests.runtime.layers.modules import (
    HeadsFirstProcessor,
    OtherProcessor,
    OwnAttention,
    TinyModel,
    WeightedProcessor,
    attention,
    xFuserHeadsFirstProcessorWrapper,
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
from xfuser_runtime.attention import parallel_attention
from xfuser_runtime.distributed.parallel_state import (
    get_sp_group,
)
from xfuser_runtime.distributed.runtime_state import (
    destroy_runtime_state,
)
from xfuser_runtime.errors import InputError
from xfuser_runtime.layers import attention as attention_layer
from xfuser_runtime.layers import (
    attention_site,
    processors,
    whole_batch_processor,
    wrap_attention,
)


@pytest.fixture(autouse=True)
def _no_session() -> Iterator[None]:
    yield
    destroy_runtime_state()


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
    attention_site.parallel_attention = lambda *args, **kwargs: parallel_attention(
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

    @pytest.mark.parametrize("given", [OtherProcessor(), AttnAddedKVProcessor2_0()])
    def test_one_that_is_not_ported_is_refused(
        self, given: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(processors, "get_sequence_parallel_world_size", lambda: 2)
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

    def test_one_for_the_whole_batch_is_refused_in_stages(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = nn.Sequential(wrap_attention(attention(), ("image",), ("image",)))
        name = f"{HeadsFirstProcessor.__module__}.HeadsFirstProcessor"
        processors.refuse_stages(model, (name,))
        monkeypatch.setattr(processors, "get_pipeline_parallel_world_size", lambda: 2)
        processors.refuse_stages(model, ())
        with pytest.raises(InputError, match="in a model of several stages"):
            processors.refuse_stages(model, (name,))

    def test_one_that_is_not_ported_runs_where_nothing_is_split(self) -> None:
        given = OtherProcessor()
        module = attention()
        module.set_processor(given)
        wrap_attention(module, ("image",), ("image",))
        model = nn.Sequential(module)
        assert module.processor is given and whole_batch_processor(model) is given
        module.set_processor(HeadsFirstProcessor())
        assert whole_batch_processor(model) is None
        name = f"{HeadsFirstProcessor.__module__}.HeadsFirstProcessor"
        assert whole_batch_processor(model, (name,)) is module.processor

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


def test_wrong_rows_are_refused() -> None:
    def body(rank: int) -> None:
        state = start(2)
        module = wrap_attention(attention(), ("image",), ("image",))
        enter(state)
        module(tokens())

    with pytest.raises(RankError, match="11 query rows on shard 0, expected 6"):
        run_ranks(body, 2)
