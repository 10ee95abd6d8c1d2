"""Captured calls: what is captured, what is left alone and why, and when a capture is stale.

On CPU a capture is played by running the captured function again and writing its output to
the same tensors, which is what a graph does. The same on CUDA is at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.runtime.cuda.played import played
from xfuser_runtime.attention.cache import KVCache
from xfuser_runtime.attention.keys import KeyBlock
from xfuser_runtime.config import EngineConfig, RuntimeConfig
from xfuser_runtime.cuda.graphs import MAX_GRAPHS, CallReplayer
from xfuser_runtime.cuda.snapshot import ModelSnapshot
from xfuser_runtime.distributed.layout import Segment, TokenLayout
from xfuser_runtime.distributed.runtime_state import (
    RuntimeState,
    destroy_runtime_state,
    get_runtime_state,
    initialize_runtime_state,
)
from xfuser_runtime.layers.attention import reset_kv_caches
from xfuser_runtime.layers.attention_site import AttentionSite
from xfuser_runtime.transformers.kernels import run_call
from xfuser_runtime.transformers.outputs import map_tensors, tensors_in
from xfuser_runtime.transformers.stages import StagePlan
from xfuser_runtime.transformers.wrapping import Wrapping


class Processor:
    def __init__(self) -> None:
        self.scale = 1.0


class Model(nn.Module):
    """Its weights and settings change its output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.layer.scaling = {"default": 1.0}
        self.layer.processor = Processor()

    def compute(self, x: torch.Tensor, *, factor: Any = 1.0, **_: Any) -> Any:
        scale = self.layer.scaling["default"] * self.layer.processor.scale
        return {"sample": self.layer(x) * factor * scale, "text": (x + 1,)}


class Captures:
    """Played captures, counted."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, function: Callable[[], Any]) -> Any:
        self.count += 1
        return played(function)


@pytest.fixture()
def replayer() -> CallReplayer:
    return CallReplayer(played)


def run(replayer: CallReplayer, model: Model, seed: int = 0, **kwargs: Any) -> bool:
    """One call, checked against the plain one; whether a graph answered."""
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
    before = replayer.replays
    with torch.no_grad():
        found = replayer.call(Model.compute, model, (x,), kwargs)
        expected = model.compute(x, **kwargs)
    assert list(found) == ["sample", "text"] and isinstance(found["text"], tuple)
    for a, b in zip(tensors_in(found), tensors_in(expected), strict=True):
        assert torch.equal(a, b)
    return replayer.replays > before


def test_second_call_of_a_shape_is_captured(
    state: RuntimeState, replayer: CallReplayer
) -> None:
    model = Model()
    assert [run(replayer, model, seed) for seed in range(4)] == [
        False,
        True,
        True,
        True,
    ]


def test_outputs_do_not_change_with_later_calls(
    state: RuntimeState, replayer: CallReplayer
) -> None:
    model, ones = Model(), torch.ones(1, 4)
    with torch.no_grad():
        calls = [replayer.call(Model.compute, model, (ones * i,), {}) for i in range(4)]
        for i, found in enumerate(calls):
            assert torch.equal(found["sample"], model.compute(ones * i)["sample"])


def test_constants_shapes_and_calls_of_a_pass_have_graphs_of_their_own(
    state: RuntimeState, replayer: CallReplayer
) -> None:
    model = Model()
    for factor in (1.0, 2.0, True):
        assert not run(replayer, model, factor=factor)
        assert run(replayer, model, factor=factor)
    state.start_pass(step=0, patch=None)
    for index in range(2):
        state.enter_transformer_call()
        assert not run(replayer, model, factor=3.0), index


def test_old_graphs_make_room(state: RuntimeState, replayer: CallReplayer) -> None:
    model = Model()
    for factor in range(MAX_GRAPHS + 1):
        run(replayer, model, factor=float(factor))
    assert not run(replayer, model, factor=0.0)
    assert run(replayer, model, factor=float(MAX_GRAPHS))


@pytest.mark.parametrize("change", ["weight", "scale", "processor", "address", "layer"])
def test_a_changed_model_is_captured_again(
    state: RuntimeState, replayer: CallReplayer, change: str
) -> None:
    model = Model()
    assert not run(replayer, model)
    assert run(replayer, model)
    layer = model.layer
    if change == "weight":
        layer.weight = nn.Parameter(layer.weight * 2)
    elif change == "scale":
        layer.scaling["default"] = 2.0
    elif change == "processor":
        layer.processor.scale = 3.0
    elif change == "address":
        layer.weight.data = layer.weight.data * 2
    else:
        layer.adapter = nn.Linear(4, 4)
    assert [run(replayer, model) for _ in range(3)] == [False, True, True]


def test_a_snapshot_ignores_what_the_runtime_keeps() -> None:
    model = Model()
    model.__dict__["_xfuser_note"] = 0
    snapshot = ModelSnapshot(model)
    assert snapshot.holds()
    model.__dict__["_xfuser_note"] = 1
    assert snapshot.holds()
    model.layer.training = False
    assert not snapshot.holds()


def test_a_model_that_always_changes_is_left_alone(
    state: RuntimeState, replayer: CallReplayer
) -> None:
    model = Model()
    for number in range(40):
        run(replayer, model)
        if number % 2:
            model.layer.scaling["default"] = float(number)
    replays = replayer.replays
    assert not run(replayer, model)
    assert replayer.replays == replays
    assert replayer.reasons == [
        "weights, adapters or settings change from call to call"
    ]


class TestLeftAlone:
    """Calls that run as they are, with the reason."""

    def expect(self, replayer: CallReplayer, reason: str, **kwargs: Any) -> None:
        model = Model()
        assert not any(run(replayer, model, **kwargs) for _ in range(3))
        assert [text for text in replayer.reasons if reason in text]

    def test_unknown_argument(
        self, state: RuntimeState, replayer: CallReplayer
    ) -> None:
        self.expect(replayer, "an argument of type object", other=object())

    def test_two_devices(self, state: RuntimeState, replayer: CallReplayer) -> None:
        other = torch.ones(1, device="meta")
        self.expect(replayer, "on cpu, meta", other=other)

    def test_hook(self, state: RuntimeState, replayer: CallReplayer) -> None:
        model = Model()
        model.layer.register_forward_hook(lambda *_: None)
        assert not any(run(replayer, model) for _ in range(3))
        assert replayer.reasons == ["a hook on layer"]

    def test_gradients(self, state: RuntimeState, replayer: CallReplayer) -> None:
        model = Model()
        for _ in range(3):
            replayer.call(Model.compute, model, (torch.ones(1, 4),), {})
        assert replayer.replays == 0
        assert replayer.reasons == ["gradients are enabled"]

    def test_failed_capture(self, state: RuntimeState) -> None:
        def failing(function: Callable[[], Any]) -> Any:
            raise RuntimeError("operation not permitted\nwhen capturing")

        replayer = CallReplayer(failing)
        self.expect(replayer, "the capture failed: operation not permitted")

    def test_turned_off(self) -> None:
        initialize_runtime_state(
            EngineConfig(
                runtime_config=RuntimeConfig(use_cuda_graph=False), world_size=1
            )
        )
        replayer, model = CallReplayer(played), Model()
        assert not any(run(replayer, model) for _ in range(3))
        assert replayer.reasons == []
        destroy_runtime_state()


#: Two patches of two rows of the latents.
LAYOUT = TokenLayout((Segment("image", 4, follows_latents=True),), 2, 1)


class KeepingModel(nn.Module):
    """Its passes over patches add rows to those of earlier passes, and read them all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Module()
        vars(self.layer)["_xfuser_attention_site"] = AttentionSite(
            ("image",), ("image",)
        )

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        state = get_runtime_state()
        cache: KVCache = vars(self.layer)["_xfuser_attention_site"].caches.next(
            object()
        )
        options: Any = {"layout": LAYOUT, "names": ("image",), "shards": (0,)}
        key = x[:, :, None, None]
        cache.store(KeyBlock(key, key, None), patch=state.patch, **options)
        return cache.read(**options).key.sum() + x


class TestPatches:
    """Passes over patches: captured once they leave what they keep where they found it."""

    def passes(
        self, replayer: CallReplayer, model: KeepingModel, *, warmup: int = 1
    ) -> list[bool]:
        """A loop of four steps; by pass whether a graph answered, each result checked."""
        state, found = get_runtime_state(), []
        rows = torch.zeros(1, 4)
        state.begin_loop()
        state.num_patches = 2
        state.adopt_patch_borders(LAYOUT, 1, 4)
        for step in range(4):
            for patch in (None,) if step < warmup else (0, 1):
                state.start_pass(step=step, patch=patch)
                state.enter_transformer_call()
                here = slice(0, 4) if patch is None else slice(2 * patch, 2 * patch + 2)
                x = torch.randn(1, 4)[:, here]
                rows[:, here] = x
                before = replayer.replays
                with torch.no_grad():
                    out = replayer.call(KeepingModel.compute, model, (x,), {})
                torch.testing.assert_close(out, rows.sum() + x)
                found.append(replayer.replays > before)
        state.end_passes()
        return found

    def test_from_the_second_step_over_patches_on(self, state: RuntimeState) -> None:
        replayer, model = CallReplayer(played), KeepingModel()
        assert self.passes(replayer, model) == [False] * 3 + [True] * 4
        assert replayer.reasons == []

    def test_the_next_call_goes_on_with_the_graphs(self, state: RuntimeState) -> None:
        captures, model = Captures(), KeepingModel()
        replayer = CallReplayer(captures)
        self.passes(replayer, model)
        reset_kv_caches(model)
        assert self.passes(replayer, model) == [False] + [True] * 6
        assert captures.count == 2

    def test_rows_that_moved_are_captured_again(self, state: RuntimeState) -> None:
        captures, model = Captures(), KeepingModel()
        replayer = CallReplayer(captures)
        self.passes(replayer, model)
        ((_, cache),) = vars(model.layer)["_xfuser_attention_site"].caches.items()
        cache._key = cache._key.clone()
        assert self.passes(replayer, model) == [False] + [True] * 6
        assert captures.count == 4

    def test_whole_streams_that_moved_are_captured_again(
        self, state: RuntimeState
    ) -> None:
        captures, model = Captures(), KeepingModel()
        streams: dict[str, Any] = {}
        replayer = CallReplayer(captures, streams=streams)
        # As a transformer's first pass makes them, after its replayer.
        streams["blocks"] = {"image": torch.zeros(1)}
        self.passes(replayer, model)
        assert captures.count == 2
        streams["blocks"] = {"image": torch.zeros(2)[1:]}
        assert self.passes(replayer, model) == [False] + [True] * 6
        assert captures.count == 4

    def test_a_pass_that_adds_rows_is_left_alone(self, state: RuntimeState) -> None:
        replayer, model = CallReplayer(played), KeepingModel()
        for _ in range(2):
            found = self.passes(replayer, model, warmup=0)
            assert not any(found[:2]) and all(found[-2:])
        assert replayer.reasons == []

    def test_the_passes_that_begin_a_loop_are_left_alone(
        self, state: RuntimeState
    ) -> None:
        replayer, model = CallReplayer(played), KeepingModel()
        state.num_patches = 2
        with torch.no_grad():
            for step, patch in ((0, 0), (0, 0), (0, 0), (1, None), (2, None)):
                state.start_pass(step=step, patch=patch)
                x = torch.ones(1, 4 if patch is None else 2)
                replayer.call(KeepingModel.compute, model, (x,), {})
        assert replayer.replays == 0 and replayer.reasons == []


def test_on_cpu_nothing_is_captured(state: RuntimeState) -> None:
    model, wrapping = Model(), Wrapping(StagePlan((), 1))
    with torch.no_grad():
        for _ in range(3):
            run_call(Model.compute, model, wrapping, (torch.ones(2, 4),), {})
    assert wrapping.replayer is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnDevice:
    def test_replays(self, state: RuntimeState) -> None:
        model, replayer = Model().cuda(), CallReplayer()
        with torch.no_grad():
            for seed in range(4):
                x = torch.randn(2, 4).cuda() + seed
                found = replayer.call(Model.compute, model, (x,), {})
                expected = map_tensors(torch.clone, model.compute(x))
                for a, b in zip(tensors_in(found), tensors_in(expected), strict=True):
                    assert torch.equal(a, b)
        assert replayer.replays == 3 and not replayer.reasons

    def test_a_call_that_waits_for_the_device_falls_back(
        self, state: RuntimeState
    ) -> None:
        def waits(model: Model, x: torch.Tensor) -> torch.Tensor:
            return x * x.sum().item()

        model, replayer = Model().cuda(), CallReplayer()
        with torch.no_grad():
            for _ in range(3):
                x = torch.randn(2, 4).cuda()
                assert torch.equal(
                    replayer.call(waits, model, (x,), {}), waits(model, x)
                )
        assert "the capture failed" in replayer.reasons[0]
