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

from tests.runtime.cuda.played import played, played_without_reads
from xfuser_runtime.attention.cache import KVCache
from xfuser_runtime.attention.keys import KeyBlock
from xfuser_runtime.config import EngineConfig, RuntimeConfig
from xfuser_runtime.cuda.graphs import MAX_GRAPHS, MAX_STALE, CallReplayer
from xfuser_runtime.cuda.notes import HostNotes
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


def test_third_call_of_a_shape_is_captured(
    state: RuntimeState, replayer: CallReplayer
) -> None:
    model = Model()
    found = [run(replayer, model, seed) for seed in range(4)]
    assert found == [False, False, True, True]


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
        found = [run(replayer, model, factor=factor) for _ in range(3)]
        assert found == [False, False, True]
    state.start_pass(step=0, patch=None)
    for index in range(2):
        state.enter_transformer_call()
        assert not run(replayer, model, factor=3.0), index


def test_old_graphs_make_room(state: RuntimeState, replayer: CallReplayer) -> None:
    model = Model()
    for factor in range(MAX_GRAPHS + 1):
        for _ in range(2):
            run(replayer, model, factor=float(factor))
    assert run(replayer, model, factor=float(MAX_GRAPHS))
    assert not run(replayer, model, factor=0.0)


@pytest.mark.parametrize("change", ["weight", "scale", "processor", "address", "layer"])
def test_a_changed_model_is_captured_again(
    state: RuntimeState, replayer: CallReplayer, change: str
) -> None:
    model = Model()
    assert [run(replayer, model) for _ in range(3)] == [False, False, True]
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
    found = [run(replayer, model) for _ in range(4)]
    assert found == [False, False, True, True]


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
    for number in range(60):
        run(replayer, model)
        if number % 3 == 2:
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

    def test_numbers_of_the_host_that_always_change(
        self, state: RuntimeState, replayer: CallReplayer
    ) -> None:
        """As a time step that is left on the host: what is sent from it is never sent again."""

        def compute(model: Model, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return x + time.to("meta")

        with torch.no_grad():
            for number in range(4 * MAX_STALE):
                args = (torch.ones(2, device="meta"), torch.full((2,), number))
                replayer.call(compute, Model(), args, {})
        assert replayer.replays == 0
        assert replayer.reasons == [
            "the host sends or reads numbers that change from call to call"
        ]

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

    def test_from_the_third_step_over_patches_on(self, state: RuntimeState) -> None:
        replayer, model = CallReplayer(played), KeepingModel()
        assert self.passes(replayer, model) == [False] * 5 + [True] * 2
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


class Lengths:
    """A call that waits for the number of rows that a mask marks."""

    def __init__(self, model: nn.Module, capture: Any = played_without_reads) -> None:
        self.model = model
        self.replayer = CallReplayer(capture)

    @staticmethod
    def compute(
        model: Model, x: torch.Tensor, mask: torch.Tensor, *, from_x: bool = False
    ) -> torch.Tensor:
        length = int((x if from_x else mask).sum())
        rows = torch.arange(len(x), device=x.device) < length
        out: torch.Tensor = model.layer(x) * rows[:, None] * length
        return out

    def run(self, mask: torch.Tensor, **kwargs: Any) -> bool:
        """One call with other rows, checked; whether a graph answered."""
        x = torch.randn(4, 4).to(mask.device)
        before = self.replayer.replays
        with torch.no_grad():
            found = self.replayer.call(self.compute, self.model, (x, mask), kwargs)
            assert torch.equal(found, self.compute(self.model, x, mask, **kwargs))
        return self.replayer.replays > before


class TestReads:
    """Calls that wait for numbers: noted once, then captured for the same arguments."""

    def test_third_call_is_captured(self, state: RuntimeState) -> None:
        lengths, mask = Lengths(Model()), torch.tensor([1, 1, 0, 0])
        assert [lengths.run(mask) for _ in range(4)] == [False, False, True, True]
        assert lengths.run(mask.clone())
        assert lengths.replayer.reasons == []

    def test_other_numbers_are_noted_anew(self, state: RuntimeState) -> None:
        lengths = Lengths(Model())
        for number in range(2 * MAX_STALE):
            mask = torch.full((4,), number)
            expected = [False] * (2 if number == 0 else 1) + [True] * 3
            assert [lengths.run(mask) for _ in expected] == expected
        assert lengths.replayer.reasons == []

    def test_two_calls_in_turn_have_a_graph_each(self, state: RuntimeState) -> None:
        lengths = Lengths(Model())
        masks = [torch.tensor([1, 1, 1, 0]), torch.tensor([1, 0, 0, 0])]
        found = [lengths.run(mask) for _ in range(4) for mask in masks]
        # The first call of a signature is noted for none of them.
        assert found == [False, False, False, True, True, True, True, True]
        assert lengths.replayer.reasons == []

    def test_notes_of_other_numbers_would_be_wrong(
        self, state: RuntimeState, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lengths = Lengths(Model())
        assert [lengths.run(torch.ones(4)) for _ in range(3)] == [False, False, True]
        monkeypatch.setattr(HostNotes, "hold", lambda self, arguments: True)
        with pytest.raises(AssertionError):
            lengths.run(torch.zeros(4))

    def test_another_shape_has_notes_of_its_own(self, state: RuntimeState) -> None:
        captures = Captures()

        def counted(function: Callable[[], Any]) -> Any:
            captures.count += 1
            return played_without_reads(function)

        lengths = Lengths(Model(), counted)
        for mask in (torch.ones(4), torch.ones(5)):
            assert [lengths.run(mask) for _ in range(3)] == [False, False, True]
        assert captures.count == 2

    @pytest.mark.parametrize("from_x", [False, True])
    def test_numbers_that_always_change_are_left_alone(
        self, state: RuntimeState, from_x: bool
    ) -> None:
        lengths = Lengths(Model())
        for number in range(4 * MAX_STALE):
            mask = torch.full((4,), 0 if from_x else number)
            assert not lengths.run(mask, from_x=from_x)
        assert lengths.replayer.reasons == [
            "the host sends or reads numbers that change from call to call"
        ]

    def test_numbers_of_weights_are_left_alone(self, state: RuntimeState) -> None:
        model, replayer = Model(), CallReplayer(played_without_reads)

        def compute(model: Model, x: torch.Tensor) -> torch.Tensor:
            return x * model.layer.bias[0].item()

        with torch.no_grad():
            for number in range(4):
                x = torch.full((2, 4), float(number))
                found = replayer.call(compute, model, (x,), {})
                assert torch.equal(found, compute(model, x))
        assert replayer.replays == 0
        assert "do not follow from the arguments alone" in replayer.reasons[0]


def _marked(x: torch.Tensor) -> torch.Tensor:
    marks = torch.zeros_like(x, dtype=torch.bool)
    marks[:, torch.arange(2, device=x.device)] = True
    return marks.to(x.dtype)


class Rows:
    """A cache as pipelines hand it to every call."""

    def __init__(self) -> None:
        self.mode = "write"
        self.rows: list[torch.Tensor] = []


class TestContainers:
    """Lists and objects among the arguments."""

    def test_lists_that_the_call_takes_apart(
        self, state: RuntimeState, replayer: CallReplayer
    ) -> None:
        def compute(model: Model, x: torch.Tensor, more: Any) -> torch.Tensor:
            while more:
                x = x + more.pop()
            return x

        model = Model()
        with torch.no_grad():
            for number in range(4):
                x, more = torch.ones(2), [torch.full((2,), float(number))] * 2
                found = replayer.call(compute, model, (x, list(more)), {})
                assert torch.equal(found, compute(model, x, more))
        assert replayer.replays == 2 and replayer.reasons == []

    def test_objects_are_read_by_graphs_and_written_without(
        self, state: RuntimeState, replayer: CallReplayer
    ) -> None:
        def compute(model: Model, x: torch.Tensor, cache: Rows) -> torch.Tensor:
            if cache.mode == "write":
                cache.rows.append(x * 2)
            elif cache.mode == "add":
                cache.rows[0].add_(x)
            return x + sum(cache.rows)

        model, replays = Model(), []
        for _ in range(2):
            cache, other = Rows(), Rows()
            for mode in ("write", "add", "add", "read", "read", "read"):
                cache.mode = other.mode = mode
                x, before = torch.randn(2), replayer.replays
                with torch.no_grad():
                    found = replayer.call(compute, model, (x, cache), {})
                    assert torch.equal(found, compute(model, x, other))
                replays.append(replayer.replays > before)
        assert replays == [*[False] * 5, True, *[False] * 3, *[True] * 3]
        assert replayer.reasons == []

    def test_an_object_that_holds_itself(
        self, state: RuntimeState, replayer: CallReplayer
    ) -> None:
        model, cache = Model(), Rows()
        vars(cache)["rows"] = [cache]
        assert not any(run(replayer, model, other=cache) for _ in range(3))
        assert replayer.reasons == ["an argument of type Rows"]


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
        assert replayer.replays == 2 and not replayer.reasons

    def test_two_devices(self, state: RuntimeState) -> None:
        model, replayer = Model().cuda(), CallReplayer()
        kwargs = {"other": torch.ones(1, device="meta")}
        with torch.no_grad():
            for _ in range(4):
                replayer.call(Model.compute, model, (torch.ones(2, 4).cuda(),), kwargs)
        assert replayer.replays == 0 and "on cuda:0, meta" in replayer.reasons[0]

    def test_a_call_that_waits_for_a_mask(self, state: RuntimeState) -> None:
        lengths, mask = Lengths(Model().cuda(), None), torch.ones(4).cuda()
        assert [lengths.run(mask) for _ in range(4)] == [False, False, True, True]
        for number in range(2 * MAX_STALE):
            mask[number % 4] *= -1
            assert [lengths.run(mask) for _ in range(3)] == [False, True, True]
        assert lengths.replayer.reasons == []

    def test_a_call_that_waits_for_its_rows_falls_back(
        self, state: RuntimeState
    ) -> None:
        lengths, mask = Lengths(Model().cuda(), None), torch.ones(4).cuda()
        for _ in range(4 * MAX_STALE):
            assert not lengths.run(mask, from_x=True)
        assert lengths.replayer.reasons == [
            "the host sends or reads numbers that change from call to call"
        ]

    @pytest.mark.parametrize("waits", [False, True], ids=["raises", "waits"])
    def test_a_failed_capture_leaves_the_device_as_it_was(
        self, state: RuntimeState, waits: bool
    ) -> None:
        def fails(model: Model, x: torch.Tensor) -> torch.Tensor:
            if torch.cuda.is_current_stream_capturing():
                if not waits:
                    raise RuntimeError("not now")
                torch.cuda.synchronize()
            return x * 2

        model, x = Model().cuda(), torch.ones(2, 4).cuda()
        replayer = CallReplayer()
        with torch.no_grad():
            assert replayer.call(Model.compute, model, (x,), {})
            for _ in range(2):
                replayer.call(Model.compute, model, (x,), {})
            for _ in range(4):
                assert torch.equal(replayer.call(fails, model, (x[:1],), {}), x[:1] * 2)
            assert replayer.replays == 1 and len(replayer.reasons) == 1
            assert torch.randn(4, device="cuda").isfinite().all()
            other = CallReplayer()
            for _ in range(4):
                other.call(Model.compute, model, (x,), {})
            assert other.replays == 2

    def test_random_numbers_follow_the_seed(self, state: RuntimeState) -> None:
        def noisy(model: Model, x: torch.Tensor) -> torch.Tensor:
            return model.layer(x) + torch.randn_like(x)

        model, replayer, x = Model().cuda(), CallReplayer(), torch.ones(2, 4).cuda()
        with torch.no_grad():
            for seed in range(4):
                torch.manual_seed(seed)
                found = replayer.call(noisy, model, (x,), {})
                torch.manual_seed(seed)
                assert torch.equal(found, noisy(model, x))
        assert replayer.replays == 2

    @pytest.mark.parametrize(
        "constant",
        [
            lambda x: torch.arange(4.0).to(x.device),
            lambda x: torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device),
            lambda x: x.new_tensor([1.0, 2.0, 3.0, 4.0]),
            lambda x: torch.zeros(4, device=x.device).copy_(torch.arange(4.0)),
            lambda x: x[:, torch.tensor([3, 2, 1, 0])],
            lambda x: x[:, [3, 2, 1, 0]],
            lambda x: _marked(x),
        ],
        ids=["to", "tensor", "new_tensor", "copy_", "index", "list", "item"],
    )
    def test_a_call_that_sends_numbers(
        self, state: RuntimeState, constant: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        def compute(model: Model, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = model.layer(x) + constant(x)
            return out

        model, replayer = Model().cuda(), CallReplayer()
        with torch.no_grad():
            for _ in range(4):
                x = torch.randn(2, 4).cuda()
                found = replayer.call(compute, model, (x,), {})
                assert torch.equal(found, compute(model, x))
        assert replayer.replays == 2 and not replayer.reasons
