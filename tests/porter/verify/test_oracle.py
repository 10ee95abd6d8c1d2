"""The oracle against displaced patches written out by hand, and what it must refuse."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import diffusers
import pytest
import torch

import porter.verify
from porter.shrink import call_kwargs
from porter.verify import oracle
from porter.verify.cases import CUTOFF, Case, cases_for, fresh
from porter.verify.floor import reference, run_stock
from porter.verify.gate import passes, relative_error, sabotage_shows
from porter.verify.geometry import LatentRows, OracleRefusal
from porter.verify.oracle import DisplacedPatches
from porter.verify.stale_keys import StaleKeys
from tests.porter.verify import by_hand
from xfuser_runtime.distributed.layout import Segment, TokenLayout

GUIDED = Case(2, 1, 1, True)
# Latent rows 12 of 2 a token row; tokens 60 beside 48 or more of text.
PIXART_PATCHES = {2: [(0, 6), (6, 12)], 3: [(0, 4), (4, 8), (8, 12)]}


def _joint_patches(pipe: Any, call: Callable[[], Any], count: int) -> Any:
    """Borders in tokens."""
    tokens = torch.arange(run_stock(pipe, call)[0].shape[1])
    return [(int(p[0]), int(p[-1]) + 1) for p in tokens.tensor_split(count)]


@pytest.mark.parametrize(("patches", "warmup"), [(2, 1), (3, 2)])
def test_equals_pixart_by_hand(pixart: Any, patches: int, warmup: int) -> None:
    call = fresh(pixart, GUIDED)
    floor = reference(pixart, call).floor
    found = DisplacedPatches(patches, warmup).run(pixart, call)
    expected = by_hand.pixart(pixart, call(), PIXART_PATCHES[patches], warmup)
    assert passes(relative_error(found, [expected]), floor)
    assert sabotage_shows(relative_error(found, run_stock(pixart, call)), floor)


@pytest.mark.parametrize("patches", [2, 4])
def test_equals_joint_attention_by_hand(joint: Any, patches: int) -> None:
    call = fresh(joint, GUIDED)
    floor = reference(joint, call).floor
    found = DisplacedPatches(patches, 1).run(joint, call)
    borders = _joint_patches(joint, call, patches)
    expected = by_hand.joint(joint, call(), borders, 1)
    assert passes(relative_error(found, [expected]), floor)
    # Borders one token off are another simulation: the comparison can fail.
    (_, stop), (_, after), *rest = borders
    shifted = [(0, stop + 1), (stop + 1, after), *rest]
    wrong = by_hand.joint(joint, call(), shifted, 1)
    assert sabotage_shows(relative_error(found, [wrong]), floor)


@pytest.mark.parametrize("name", ["pixart", "joint", "batched"])
def test_whole_steps_and_one_patch_are_stock(
    name: str, request: pytest.FixtureRequest
) -> None:
    pipe = request.getfixturevalue(name)
    for case in (GUIDED, *(c for c in cases_for(pipe) if c.callback is not None)):
        call = fresh(pipe, case)
        stock = run_stock(pipe, call)
        for plan in (DisplacedPatches(2, 8), DisplacedPatches(1, 1)):
            if case.callback == CUTOFF and plan.warmup_steps < 8:
                continue
            assert relative_error(plan.run(pipe, call), stock) < 1e-6, case.name


@pytest.mark.parametrize(
    "scheduler",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_every_patch_has_a_scheduler_and_the_whole_noise(
    batched: Any, scheduler: str
) -> None:
    own = batched.scheduler
    try:
        batched.scheduler = getattr(diffusers, scheduler)()
        call = fresh(batched, GUIDED)
        stock = run_stock(batched, call)
        one = DisplacedPatches(1, 1).run(batched, call)
        assert relative_error(one, stock) < 1e-6
        three = DisplacedPatches(3, 1).run(batched, call)
        assert relative_error(three, stock) > 1e-4
    finally:
        batched.scheduler = own


def test_steps_that_another_model_reads_begin_whole(joint: Any) -> None:
    def reads_latents(module: Any, args: Any, kwargs: Any) -> Any:
        read = kwargs["hidden_states"].mean()
        text = kwargs["encoder_hidden_states"] * (1 + read)
        return args, kwargs | {"encoder_hidden_states": text}

    def called() -> dict[str, Any]:
        nothing = {"callback_on_step_end": lambda *_: {}}
        return dict(fresh(joint, GUIDED)()) | nothing

    call = fresh(joint, GUIDED)
    handle = joint.transformer.register_forward_pre_hook(
        reads_latents, with_kwargs=True
    )
    try:
        whole = DisplacedPatches(2, 1, whole_steps=True).run(joint, call)
        late = DisplacedPatches(2, 1).run(joint, call)
        after_callbacks = DisplacedPatches(2, 1).run(joint, called)
    finally:
        handle.remove()
    assert relative_error(late, whole) > 1e-4
    assert relative_error(after_callbacks, whole) == 0


def test_without_warmup_only_filled_rows_are_seen(joint: Any) -> None:
    call = fresh(joint, GUIDED)
    stock = run_stock(joint, call)
    none = relative_error(DisplacedPatches(3, 0).run(joint, call), stock)
    one = relative_error(DisplacedPatches(3, 1).run(joint, call), stock)
    assert none > one > 0


@pytest.mark.parametrize("name", ["pixart", "joint"])
def test_more_warmup_is_nearer_to_stock(
    name: str, request: pytest.FixtureRequest
) -> None:
    pipe = request.getfixturevalue(name)
    distances: dict[int, list[float]] = {1: [], 4: []}
    for seed in range(5):

        def call(seed: int = seed) -> dict[str, Any]:
            return call_kwargs(pipe, seed=seed)

        stock = run_stock(pipe, call)
        for warmup, found in distances.items():
            outputs = DisplacedPatches(2, warmup).run(pipe, call)
            found.append(relative_error(outputs, stock))
    assert mean(distances[4]) < 0.9 * mean(distances[1])


def test_wrong_timing_is_seen(pixart: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call = fresh(pixart, GUIDED)
    floor = reference(pixart, call).floor
    right = DisplacedPatches(3, 1).run(pixart, call)
    updated = StaleKeys._updated

    def frozen(self: Any, site: Any, call: Any, rows: Any) -> Any:
        before = self._cached.get(site)
        after = updated(self, site, call, rows)
        if self._patch is not None:
            self._cached[site] = before
        return after

    monkeypatch.setattr(StaleKeys, "_updated", frozen)
    wrong = DisplacedPatches(3, 1).run(pixart, call)
    assert sabotage_shows(relative_error(wrong, right), floor)


def test_the_pipeline_is_left_as_it_was(joint: Any) -> None:
    call = fresh(joint, GUIDED)
    before = run_stock(joint, call)
    scheduler = joint.scheduler
    DisplacedPatches(2, 1).run(joint, call)
    assert joint.scheduler is scheduler
    assert "step" not in vars(scheduler)
    assert "enumerate" not in vars(__import__(type(joint).__module__, fromlist=["x"]))
    assert not joint.transformer._forward_pre_hooks
    assert torch.equal(run_stock(joint, call)[0], before[0])


@pytest.mark.parametrize("rows", [2, 5, 6, 7, 12, 60, 63])
@pytest.mark.parametrize("tokens", [1, 9, 16])
@pytest.mark.parametrize("text", [0, 16, 48, 333])
def test_borders_agree_with_the_runtimes_layout(
    rows: int, tokens: int, text: int
) -> None:
    latents = LatentRows(2, 2, rows, tokens)
    for count in (1, 2, 3, 4):
        if count > rows:
            with pytest.raises(OracleRefusal, match=f"{count} patches for {rows}"):
                latents.borders(count)
            continue
        segments = (
            Segment("text", text),
            Segment("image", rows * tokens, row=tokens, follows_latents=True),
        )
        layout = TokenLayout(segments, count, 1)
        expected = [layout.patch_rows(patch) for patch in range(count)]
        found = [(a // 2, b // 2) for a, b in latents.borders(count)]
        assert found == expected


def test_refuses_a_batch_that_changes_in_the_loop(batched: Any) -> None:
    with pytest.raises(OracleRefusal, match="guidance must not change"):
        DisplacedPatches(2, 1).run(batched, fresh(batched, Case(1, 1, 0, True, CUTOFF)))


def test_what_the_body_does_after_the_step_counts_for_the_rows_of_the_patch(
    pixart: Any,
) -> None:
    call = fresh(pixart, GUIDED)
    floor = reference(pixart, call).floor
    stepped = oracle._Simulation._scheduler_step

    def then_blend(self: Any, *arguments: Any) -> Any:
        result = stepped(self, *arguments)
        return (result[0] * 0.9, *result[1:])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle._Simulation, "_scheduler_step", then_blend)
        found = DisplacedPatches(2, 1).run(pixart, call)
    expected = by_hand.pixart(
        pixart, call(), PIXART_PATCHES[2], 1, finish=lambda rows: rows * 0.9
    )
    assert passes(relative_error(found, [expected]), floor)
    plain = by_hand.pixart(pixart, call(), PIXART_PATCHES[2], 1)
    assert sabotage_shows(relative_error(found, [plain]), floor)


def test_refuses_latents_that_no_variable_holds(pixart: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle.LoopFrame, "latents", lambda self: None)
        with pytest.raises(OracleRefusal, match="no variable of the loop"):
            DisplacedPatches(2, 1).run(pixart, fresh(pixart, GUIDED))


def test_imports_nothing_of_the_runtime() -> None:
    for path in Path(porter.verify.__file__).parent.glob("*.py"):
        used: list[str] = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                used += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                used.append(node.module or "")
        tops = {name.split(".")[0] for name in used}
        assert not tops & {"xfuser_runtime", "generated"}, path.name
