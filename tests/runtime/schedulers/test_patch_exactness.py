"""Stepping patches gives the bits of the whole step, for the schedulers that ports meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from tests.runtime.schedulers.denoise import (
    BORDERS,
    SHAPES_AND_DIMS,
    denoise,
    differences,
    first_latents,
    session,
)
from xfuser_runtime.distributed.runtime_state import LatentSlice
from xfuser_runtime.randomness import rows_of_whole_batch
from xfuser_runtime.schedulers import wrap_scheduler

# Some upstream schedulers give a torch tensor to numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")

#: Name, scheduler, arguments of `step`.
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "dpm++": (lambda: DPMSolverMultistepScheduler(), {}),
    "dpm++ order 3": (lambda: DPMSolverMultistepScheduler(solver_order=3), {}),
    "dpm++ sde": (
        lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
        {},
    ),
    "dpm++ flow": (
        lambda: DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        {},
    ),
    "ddim": (lambda: DDIMScheduler(), {}),
    "ddim eta": (lambda: DDIMScheduler(clip_sample=False), {"eta": 0.7}),
    "ddpm": (lambda: DDPMScheduler(), {}),
    "euler": (lambda: EulerDiscreteScheduler(), {}),
    "euler churn": (lambda: EulerDiscreteScheduler(), {"s_churn": 2.0}),
    "euler ancestral": (lambda: EulerAncestralDiscreteScheduler(), {}),
    "unipc": (lambda: UniPCMultistepScheduler(), {}),
    "unipc order 3": (lambda: UniPCMultistepScheduler(solver_order=3), {}),
    "heun": (lambda: HeunDiscreteScheduler(), {}),
    "kdpm2": (lambda: KDPM2DiscreteScheduler(), {}),
    "pndm": (lambda: PNDMScheduler(), {}),
    "pndm plms": (lambda: PNDMScheduler(skip_prk_steps=True), {}),
    "flow euler": (lambda: FlowMatchEulerDiscreteScheduler(), {}),
    "flow euler stochastic": (
        lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        {},
    ),
    "flow heun": (lambda: FlowMatchHeunDiscreteScheduler(), {}),
}

DRAWING = [
    "dpm++ sde",
    "ddim eta",
    "ddpm",
    "euler churn",
    "euler ancestral",
    "flow euler stochastic",
]


#: Patches and warm-up steps of 5: all of them on rows, each of them once on other shapes.
ALL_PASSES = [(patches, warmup) for patches in BORDERS for warmup in (0, 1, 3, 1000)]
SOME_PASSES = [(2, 1), (3, 0), (4, 3)]


@pytest.mark.parametrize(("shape", "dim"), SHAPES_AND_DIMS)
@pytest.mark.parametrize("name", CASES)
def test_patches_equal_the_whole_step(
    name: str, shape: tuple[int, ...], dim: int
) -> None:
    make, kwargs = CASES[name]
    whole = denoise(make(), shape, steps=5, **kwargs)
    with session() as state:
        for patches, warmup in ALL_PASSES if len(shape) == 4 else SOME_PASSES:
            run = denoise(
                wrap_scheduler(make()),
                shape,
                steps=5,
                state=state,
                warmup=warmup,
                borders=BORDERS[patches],
                dim=dim,
                **kwargs,
            )
            assert not differences(whole, run), f"{patches} patches, warm-up {warmup}"


@pytest.mark.parametrize("kind", ["none", "one", "list"])
@pytest.mark.parametrize("name", DRAWING)
def test_noise_is_that_of_the_whole_step(name: str, kind: str) -> None:
    make, kwargs = CASES[name]
    shape = (2, 4, 8, 6)
    whole = denoise(make(), shape, kind=kind, **kwargs)
    # The oldest diffusers draws some noise past the generator, so both must differ.
    other_kind = "one" if kind == "none" else "none"
    other = denoise(make(), shape, kind=other_kind, seed=6, **kwargs)
    assert "latents" in differences(whole, other), "the noise does not matter here"
    with session() as state:
        for warmup in (0, 2):
            wrapped = wrap_scheduler(make())
            run = denoise(
                wrapped,
                shape,
                kind=kind,
                state=state,
                warmup=warmup,
                borders=BORDERS[3],
                **kwargs,
            )
            assert not differences(whole, run), f"warm-up {warmup}"


@pytest.mark.parametrize("name", ["ddpm", "euler ancestral", "dpm++ sde"])
def test_patches_of_a_data_parallel_replica(name: str) -> None:
    make, kwargs = CASES[name]
    whole = first_latents((3, 4, 8, 6))
    stock, wrapped = make(), wrap_scheduler(make())
    results = []
    for scheduler, rows in ((stock, slice(0, 3)), (wrapped, slice(1, 3))):
        torch.manual_seed(1)
        latents = whole[rows]
        scheduler.set_timesteps(4)
        with session() as state, rows_of_whole_batch(rows.start, rows.stop, 3):
            state.num_patches, state.latents_shape = 2, tuple(latents.shape)
            for step, t in enumerate(scheduler.timesteps):
                for patch in range(2) if scheduler is wrapped else (None,):
                    state.start_pass(step=step, patch=patch)
                    if patch is not None:
                        state.latent_slice = LatentSlice(2, *BORDERS[2][patch:][:2])
                    output = torch.sin(scheduler.scale_model_input(latents, t))
                    latents = scheduler.step(output, t, latents, **kwargs).prev_sample
        results.append(latents)
    assert torch.equal(results[0][1:], results[1])


@pytest.mark.parametrize("name", ["dpm++", "ddim", "flow euler", "heun"])
@pytest.mark.parametrize("warmup", [0, 2])
def test_return_forms(name: str, warmup: int) -> None:
    make, kwargs = CASES[name]
    shape = (1, 4, 8, 6)
    with session() as state:
        runs = [
            denoise(
                wrap_scheduler(make()),
                shape,
                state=state,
                warmup=warmup,
                borders=BORDERS[2],
                return_dict=return_dict,
                **kwargs,
            )
            for return_dict in (False, True)
        ]
        whole = denoise(make(), shape, return_dict=True, **kwargs)
    assert not differences(whole, runs[1])
    assert torch.equal(runs[0].latents, runs[1].latents)


def test_output_class_is_upstreams() -> None:
    wrapped = wrap_scheduler(DDIMScheduler())
    wrapped.set_timesteps(3)
    latents = torch.randn(1, 2, 8, 4)
    stock = DDIMScheduler()
    stock.set_timesteps(3)
    expected = stock.step(latents, stock.timesteps[0], latents)
    with session() as state:
        state.num_patches, state.latents_shape = 2, tuple(latents.shape)
        state.start_pass(step=0, patch=0)
        state.latent_slice = LatentSlice(2, 0, 3)
        result = wrapped.step(latents, wrapped.timesteps[0], latents)
    assert type(result) is type(expected)
    assert torch.equal(result.prev_sample[:, :, :3], expected.prev_sample[:, :, :3])
    assert torch.equal(result.prev_sample[:, :, 3:], latents[:, :, 3:])
    assert result.keys() == expected.keys()


def test_low_precision_keeps_upstreams_dtype() -> None:
    shape = (1, 4, 8, 6)

    def call(scheduler: Any, output: Any, t: Any, sample: Any, **kwargs: Any) -> Any:
        return scheduler.step(output.bfloat16(), t, sample, return_dict=False, **kwargs)

    whole = denoise(FlowMatchEulerDiscreteScheduler(), shape, call=call)
    with session() as state:
        run = denoise(
            wrap_scheduler(FlowMatchEulerDiscreteScheduler()),
            shape,
            call=call,
            state=state,
            borders=BORDERS[3],
        )
    assert whole.latents.dtype == run.latents.dtype == torch.bfloat16
    assert not differences(whole, run)


def test_per_token_timesteps() -> None:
    shape = (2, 8, 5)
    tokens = torch.linspace(300, 900, 16).reshape(2, 8)

    def call(scheduler: Any, output: Any, t: Any, sample: Any, **kwargs: Any) -> Any:
        return scheduler.step(
            output, t, sample, per_token_timesteps=tokens, return_dict=False, **kwargs
        )

    whole = denoise(FlowMatchEulerDiscreteScheduler(), shape, call=call)
    with session() as state:
        run = denoise(
            wrap_scheduler(FlowMatchEulerDiscreteScheduler()),
            shape,
            call=call,
            state=state,
            borders=BORDERS[3],
            dim=1,
        )
    assert not differences(whole, run)


@pytest.mark.parametrize("name", ["euler", "flow euler", "dpm++"])
@pytest.mark.parametrize("warmup", [0, 2])
def test_step_called_twice_with_the_counter_set_back(name: str, warmup: int) -> None:
    # Pipelines with an unconditional second step do this; the write must reach the copy.
    make, kwargs = CASES[name]
    shape = (1, 4, 8, 6)

    def call(scheduler: Any, output: Any, t: Any, sample: Any, **kw: Any) -> Any:
        first = scheduler.step(output, t, sample, return_dict=False, **kw)[0]
        scheduler._step_index -= 1
        return scheduler.step(output * 0.5, t, first, return_dict=False, **kw)

    whole = denoise(make(), shape, call=call, **kwargs)
    with session() as state:
        run = denoise(
            wrap_scheduler(make()),
            shape,
            call=call,
            state=state,
            warmup=warmup,
            borders=BORDERS[3],
            **kwargs,
        )
    assert not differences(whole, run)


def test_attributes_read_before_the_step_are_those_of_the_patch() -> None:
    shape = (1, 4, 8, 6)
    seen: list[tuple[int | None, float]] = []

    def call(scheduler: Any, output: Any, t: Any, sample: Any, **kw: Any) -> Any:
        seen.append(
            (scheduler.step_index, float(scheduler.sigmas[scheduler.step_index]))
        )
        return scheduler.step(output, t, sample, return_dict=False, **kw)

    def begin(scheduler: Any, steps: int) -> None:
        scheduler.set_timesteps(steps)
        scheduler._step_index = 0

    make = EulerDiscreteScheduler
    denoise(make(), shape, call=call, begin=begin)
    expected = [entry for entry in seen for _ in range(3)]
    seen.clear()
    with session() as state:
        denoise(
            wrap_scheduler(make()),
            shape,
            call=call,
            begin=begin,
            state=state,
            borders=BORDERS[3],
        )
    assert seen == expected
