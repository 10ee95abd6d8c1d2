"""One scheduler over several calls: a new schedule starts afresh, a whole step follows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from tests.runtime.schedulers.denoise import (
    BORDERS,
    denoise,
    differences,
    first_latents,
    model,
    session,
)
from xfuser_runtime.distributed.runtime_state import LatentSlice
from xfuser_runtime.schedulers import wrap_scheduler

SHAPE = (1, 4, 8, 6)
CLASSES = [
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
]


@pytest.mark.parametrize("original", CLASSES)
def test_second_call_with_other_steps_patches_and_warmup(original: type) -> None:
    stock, wrapped = original(), wrap_scheduler(original())
    with session() as state:
        for steps, patches, warmup in ((5, 3, 1), (7, 2, 0), (4, 4, 1000), (6, 3, 2)):
            expected = denoise(stock, SHAPE, steps=steps)
            run = denoise(
                wrapped,
                SHAPE,
                steps=steps,
                state=state,
                warmup=warmup,
                borders=BORDERS[patches],
            )
            assert not differences(expected, run), (steps, patches, warmup)


@pytest.mark.parametrize("original", CLASSES)
@pytest.mark.parametrize("stopped_after", [1, 3])
def test_call_after_an_interrupted_one(original: type, stopped_after: int) -> None:
    class Stop(Exception):
        pass

    passes = 0

    def call(scheduler: Any, output: Any, t: Any, sample: Any, **kwargs: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes > stopped_after:  # in the middle of a step
            raise Stop
        return scheduler.step(output, t, sample, return_dict=False, **kwargs)

    wrapped = wrap_scheduler(original())
    with session() as state:
        with pytest.raises(Stop):
            denoise(wrapped, SHAPE, call=call, state=state, borders=BORDERS[2])
        # `end_passes` was not reached: the next call finds the old pass.
        run = denoise(wrapped, SHAPE, state=state, warmup=1, borders=BORDERS[3])
    assert not differences(denoise(original(), SHAPE), run)


@pytest.mark.parametrize("original", CLASSES)
def test_whole_step_after_patches(original: type) -> None:
    stock, wrapped = original(), wrap_scheduler(original())
    torch.manual_seed(0)
    expected = latents = first_latents(SHAPE)
    stock.set_timesteps(8)
    for step, t in enumerate(stock.timesteps):
        output = model(stock.scale_model_input(expected, t), step)
        expected = stock.step(output, t, expected, return_dict=False)[0]
    torch.manual_seed(0)
    with session() as state:
        state.num_patches, state.latents_shape = 3, SHAPE
        wrapped.set_timesteps(8)
        for step, t in enumerate(wrapped.timesteps):
            for patch in (0, 1, 2) if step % 4 in (1, 2) else (None,):
                state.start_pass(step=step, patch=patch)
                rows = None
                if patch is not None:
                    rows = state.latent_slice = LatentSlice(
                        2, *BORDERS[3][patch : patch + 2]
                    )
                output = model(wrapped.scale_model_input(latents, t), step)
                if rows is not None:
                    output = rows.write(
                        torch.full_like(output, 99.0), rows.narrow(output)
                    )
                latents = wrapped.step(output, t, latents, return_dict=False)[0]
        state.end_passes()
        assert vars(wrapped).keys() >= vars(stock).keys()
        for name, value in vars(stock).items():
            if isinstance(value, (int, type(None))):
                assert getattr(wrapped, name) == value, name
    assert torch.equal(expected, latents)


def test_inputs_may_be_overwritten_after_the_step() -> None:
    # A pipeline may write its latents in place, a captured graph its output buffer.
    expected = denoise(PNDMScheduler(skip_prk_steps=True), SHAPE)
    buffer = torch.empty(SHAPE)

    def call(scheduler: Any, output: Any, t: Any, sample: Any, **kwargs: Any) -> Any:
        buffer.copy_(output)
        held = sample.clone()
        result = scheduler.step(buffer, t, held, return_dict=False, **kwargs)
        buffer.fill_(float("nan"))
        held.fill_(float("nan"))
        return result

    with session() as state:
        run = denoise(
            wrap_scheduler(PNDMScheduler(skip_prk_steps=True)),
            SHAPE,
            call=call,
            state=state,
            borders=BORDERS[3],
        )
    assert not differences(expected, run)
