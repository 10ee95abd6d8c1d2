"""Stages that are not the last: counters and random numbers go on, the sample stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

from tests.runtime.schedulers.denoise import (
    BORDERS,
    denoise,
    differences,
    first_latents,
    session,
)
from xfuser_runtime.schedulers import step as step_module
from xfuser_runtime.schedulers import wrap_scheduler

SHAPE = (2, 4, 8, 6)


def _counters(scheduler: Any) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(scheduler).items()
        if isinstance(value, (int, float, type(None)))
    }


@pytest.mark.parametrize(
    ("warmup", "kind"), [(0, "none"), (2, "one"), (2, "list"), (1000, "none")]
)
@pytest.mark.parametrize(
    "make",
    [
        lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
        EulerAncestralDiscreteScheduler,
        lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        HeunDiscreteScheduler,
    ],
)
def test_first_stage_keeps_up(
    make: Any, warmup: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = make()
    expected = denoise(stock, SHAPE, kind=kind)

    def call(scheduler: Any, output: Any, t: Any, sample: Any, **kwargs: Any) -> Any:
        # What the transformer returns here: zeros of the output's shape.
        result = scheduler.step(
            torch.zeros_like(output), t, sample, return_dict=False, **kwargs
        )
        assert torch.equal(result[0], sample)
        return result

    monkeypatch.setattr(step_module, "is_pipeline_last_stage", lambda: False)
    with session() as state:
        wrapped = wrap_scheduler(make())
        run = denoise(
            wrapped,
            SHAPE,
            kind=kind,
            call=call,
            state=state,
            warmup=warmup,
            borders=BORDERS[3],
        )
        assert torch.equal(run.latents, first_latents(SHAPE))
        assert torch.equal(run.random_state, expected.random_state)
        assert _counters(wrapped).items() >= _counters(stock).items()


@pytest.mark.parametrize("return_dict", [True, False])
def test_form_is_upstreams(return_dict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "is_pipeline_last_stage", lambda: False)
    stock, wrapped = HeunDiscreteScheduler(), wrap_scheduler(HeunDiscreteScheduler())
    latents = first_latents(SHAPE)
    results = []
    with session():
        for scheduler in (stock, wrapped):
            scheduler.set_timesteps(3)
            t = scheduler.timesteps[0]
            results.append(scheduler.step(latents, t, latents, return_dict=return_dict))
    assert type(results[0]) is type(results[1])
    assert len(results[0]) == len(results[1])
    assert torch.equal(results[1][0], latents)


def test_one_process_is_the_last_stage() -> None:
    with session() as state:
        run = denoise(
            wrap_scheduler(DPMSolverMultistepScheduler()),
            SHAPE,
            state=state,
            borders=BORDERS[2],
        )
    assert not differences(denoise(DPMSolverMultistepScheduler(), SHAPE), run)
