"""Callbacks under every mode: once a step, on every rank, with whole latents.

In synchronous modes the result is stock's with the same callback. In PipeFusion it is not
stock's by design, so there the tests hold what does not depend on staleness: what callbacks
see, how often, and that what they return is taken over.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback

from tests.integration.workshop import (
    BATCHED,
    CAUGHT,
    EXACT,
    GATE,
    JOINT,
    MODES,
    PIXART,
    STEPS,
    Workshop,
    arguments,
    distance,
    latents,
    only,
)
from tests.ranks import RankError
from xfuser_runtime.distributed import get_runtime_state
from xfuser_runtime.pipelines.denoising_loop import DenoisingLoop

#: In all modes but dp2 both ranks work on the same picture.
ONE_PICTURE = tuple(mode for mode in MODES if mode != "dp2")


class Recorder:
    """A callback that keeps what it saw, and changes what it is told to.

    Args:
        scale: factor of the latents in each step.
        embeds: factor of the prompt embeddings in each step.
        stop_after: step after which it interrupts; None never.
    """

    def __init__(
        self, scale: float = 1.0, embeds: float = 1.0, stop_after: int | None = None
    ) -> None:
        self.scale, self.embeds, self.stop_after = scale, embeds, stop_after
        self.steps: list[int] = []
        self.seen: list[torch.Tensor] = []

    def on_step_end(
        self, pipeline: Any, step: int, timestep: Any, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """As `callback_on_step_end`."""
        self.steps.append(step)
        self.seen.append(kwargs["latents"].clone())
        if step == self.stop_after:
            pipeline._interrupt = True
        kwargs["latents"] = kwargs["latents"] * self.scale
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name] * self.embeds
        return kwargs

    def legacy(self, step: int, timestep: Any, held: torch.Tensor) -> None:
        """As PixArt's `callback`; changes the latents in place."""
        self.steps.append(step)
        self.seen.append(held.clone())
        held.mul_(self.scale)


def call(pipe: Any, recorder: Recorder, **changes: Any) -> torch.Tensor | None:
    """One call with the recorder; the final latents where this rank has them."""
    made = arguments(pipe, **changes)
    if type(pipe).__name__.endswith(PIXART):
        made |= {"callback": recorder.legacy, "callback_steps": 1}
    else:
        names = ["latents", "prompt_embeds"]
        if recorder.embeds != 1.0 and "Joint" in type(pipe).__name__:
            names.append("negative_prompt_embeds")
        made |= {
            "callback_on_step_end": recorder.on_step_end,
            "callback_on_step_end_tensor_inputs": names,
        }
    output = pipe(**made)
    return None if output is None else latents(output)


def both(
    workshop: Workshop, name: str, mode: str, recorder: Recorder, **changes: Any
) -> tuple[tuple[Recorder, Any], list[tuple[Recorder, Any]]]:
    """(recorder, latents) of stock, and those of every rank."""
    stock = workshop.stock(name)
    settings = (recorder.scale, recorder.embeds, recorder.stop_after)

    def body(rank: int, pipe: Any) -> tuple[Recorder, Any]:
        own = Recorder(*settings)
        return own, call(pipe, own, **changes)

    expected = call(stock, recorder, **changes)
    return (recorder, expected), workshop.run(name, mode, body)


@pytest.mark.parametrize("name", [PIXART, JOINT, BATCHED])
@pytest.mark.parametrize("mode", ONE_PICTURE)
def test_a_callback_changes_the_latents(
    workshop: Workshop, mode: str, name: str
) -> None:
    (stock, expected), ranks = both(workshop, name, mode, Recorder(scale=0.7))
    outputs = [output for _, output in ranks if output is not None]
    assert len(outputs) == 1, "the last rank alone has the output"
    for recorder, _ in ranks:
        assert recorder.steps == stock.steps == list(range(STEPS))
        for mine, first in zip(recorder.seen, ranks[0][0].seen, strict=True):
            assert torch.equal(mine, first), "ranks saw different latents"
    # The callback's last change is in the output.
    assert torch.equal(outputs[0], ranks[0][0].seen[-1] * 0.7)
    if mode in EXACT:
        for mine, theirs in zip(ranks[0][0].seen, stock.seen, strict=True):
            assert distance(mine, theirs) < GATE
        assert distance(outputs[0], expected) < GATE
    else:
        # The warm-up step is whole; the first stale one is near stock's.
        assert distance(ranks[0][0].seen[0], stock.seen[0]) < GATE
        assert distance(ranks[0][0].seen[1], stock.seen[1]) < 0.5
    unchanged = call(workshop.stock(name), Recorder())
    assert unchanged is not None and distance(expected, unchanged) > CAUGHT


@pytest.mark.parametrize("name", [PIXART, JOINT, BATCHED])
def test_each_replica_calls_back_for_its_own_pictures(
    workshop: Workshop, name: str
) -> None:
    (stock, expected), ranks = both(
        workshop, name, "dp2", Recorder(scale=0.7), batch_size=2
    )
    assert distance(torch.cat([output for _, output in ranks]), expected) < GATE
    for replica, (recorder, _) in enumerate(ranks):
        assert recorder.steps == stock.steps
        for mine, theirs in zip(recorder.seen, stock.seen, strict=True):
            assert distance(mine, theirs[replica : replica + 1]) < GATE


@pytest.mark.parametrize("name", [JOINT, BATCHED])
@pytest.mark.parametrize("mode", ONE_PICTURE)
def test_a_callback_changes_the_prompt_embeddings(
    workshop: Workshop, mode: str, name: str
) -> None:
    (_, expected), ranks = both(workshop, name, mode, Recorder(embeds=0.5))
    (found,) = [output for _, output in ranks if output is not None]
    unchanged = call(workshop.stock(name), Recorder())
    assert unchanged is not None and distance(unchanged, expected) > CAUGHT
    if mode in EXACT:
        assert distance(found, expected) < GATE
    else:
        assert distance(found, expected) < distance(found, unchanged)


@pytest.mark.parametrize("name", [JOINT, BATCHED])
@pytest.mark.parametrize("mode", ONE_PICTURE)
def test_an_interrupt_on_one_rank_stops_all(
    workshop: Workshop, mode: str, name: str
) -> None:
    stock = workshop.stock(name)
    expected = call(stock, Recorder(stop_after=1))

    def body(rank: int, pipe: Any) -> tuple[list[int], Any]:
        own = Recorder(stop_after=1 if rank == 0 else None)
        output = call(pipe, own)
        again = Recorder()
        call(pipe, again)
        assert again.steps == list(range(STEPS)), "the next call runs through"
        return own.steps, output

    ranks = workshop.run(name, mode, body)
    assert [steps for steps, _ in ranks] == [[0, 1], [0, 1]]
    (found,) = [output for _, output in ranks if output is not None]
    if mode in EXACT:
        assert distance(found, expected) < GATE


def cut_call(pipe: Any, cutoff: int) -> torch.Tensor | None:
    """Guidance up to step `cutoff`: the callback drops its half of the batch there."""
    cut = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=cutoff)
    output = pipe(**arguments(pipe), callback_on_step_end=cut)
    return None if output is None else latents(output)


@pytest.mark.parametrize("mode", [mode for mode in ONE_PICTURE if mode in EXACT])
def test_guidance_is_cut_off(workshop: Workshop, mode: str) -> None:
    expected = cut_call(workshop.stock(BATCHED), 1)
    guided = cut_call(workshop.stock(BATCHED), STEPS)
    assert expected is not None and guided is not None
    assert distance(guided, expected) > CAUGHT
    found = only(workshop.run(BATCHED, mode, lambda rank, pipe: cut_call(pipe, 1)))
    assert distance(found, expected) < GATE


def test_guidance_is_cut_off_between_patches(workshop: Workshop) -> None:
    """A whole pass follows the cut-off, so one at the end of the warm-up lengthens it."""
    found = [
        only(
            workshop.run(
                BATCHED,
                {**MODES["pipefusion"], "warmup_steps": warmup},
                lambda rank, pipe: cut_call(pipe, 0),
            )
        )
        for warmup in (1, 2, 3)
    ]
    assert distance(found[0], found[1]) < GATE
    assert distance(found[2], found[1]) > CAUGHT


def test_a_pass_after_the_cut_off_is_whole(workshop: Workshop) -> None:
    """Cut off in the last step but one, and every unguided step is a whole pass."""

    def body(rank: int, pipe: Any) -> Any:
        passes = []
        step = type(pipe.scheduler).step

        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            passes.append((get_runtime_state().step, get_runtime_state().patch))
            return step(self, *args, **kwargs)

        type(pipe.scheduler).step = counted
        cut_call(pipe, 1)
        return passes

    expected = [(0, None), (1, 0), (1, 1), (2, None), (3, 0), (3, 1)]
    assert workshop.run(BATCHED, "pipefusion", body) == [expected] * 2


def test_a_cut_off_in_patches_is_refused(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing tells that the batch changes, the caches refuse it in one line."""
    monkeypatch.setattr(DenoisingLoop, "run_whole_step", lambda self: None)
    with pytest.raises(RankError, match="run a whole pass when the batch or the image"):
        workshop.run(BATCHED, "pipefusion", lambda rank, pipe: cut_call(pipe, 1))


def test_a_legacy_callback_runs_every_few_steps(workshop: Workshop) -> None:
    def body(rank: int, pipe: Any) -> list[int]:
        steps: list[int] = []
        made = arguments(pipe, num_inference_steps=5)
        pipe(**made, callback=lambda i, t, held: steps.append(i), callback_steps=2)
        return steps

    assert workshop.run(PIXART, "pipefusion", body) == [[0, 2, 4]] * 2


@pytest.mark.parametrize("mode", ["pp2", "pipefusion"])
def test_callbacks_without_the_exchange_are_caught(
    workshop: Workshop, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sabotage: stages go on with what they hold instead of whole latents."""

    def keep_own(latents: torch.Tensor, group: Any, source: int) -> torch.Tensor:
        return latents if group.rank_in_group == source else latents.zero_()

    place = "xfuser_runtime.pipelines.denoising_loop.broadcast"
    monkeypatch.setattr(place, keep_own)
    _, ranks = both(workshop, JOINT, mode, Recorder(scale=0.7))
    first, second = (recorder.seen[1] for recorder, _ in ranks)
    assert distance(first, second) > CAUGHT
