"""Every scheduler of the installed diffusers: exact patch by patch, or refused.

New classes of a new diffusers are swept too: one that is neither exact nor refused fails.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import schedulers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from tests.runtime.schedulers.denoise import (
    BORDERS,
    Run,
    denoise,
    differences,
    first_latents,
    session,
)
from xfuser_runtime.distributed.runtime_state import LatentSlice
from xfuser_runtime.schedulers import wrap_scheduler

# What upstream's schedulers make numpy, torch and torchsde say.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array_wrap__:DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:Should have:UserWarning",
)

#: They step tokens instead of floating-point latents, or take no `sample`.
REFUSED = {
    "AmusedScheduler": {"mask_token_id": 0},
    "BlockRefinementScheduler": {},
    "DiscreteDDIMScheduler": {},
    "EntropyBoundScheduler": {},
    "KarrasVeScheduler": {},
    "VQDiffusionScheduler": {"num_vec_classes": 5},
}

#: Their pipelines step by other methods, see test_refusals.py.
WITHOUT_STEP = {"ScoreSdeVeScheduler", "ScoreSdeVpScheduler"}


@dataclass
class Setup:
    """What a scheduler needs beyond its defaults."""

    config: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = (2, 4, 8, 6)
    dim: int = 2
    steps: int = 6
    unused_timesteps: int = 0
    adapt: Callable[[Any, dict[str, Any]], Any] = lambda scheduler, call: None


def _batch_of_timesteps(scheduler: Any, call: dict[str, Any]) -> None:
    call["timestep"] = call["timestep"].expand(call["sample"].shape[0])


def _grid_of_outputs(scheduler: Any, call: dict[str, Any]) -> None:
    output = call["model_output"]
    call["model_output"] = torch.cat([output * (0.5 + i / 10) for i in range(10)], -1)


def _noise_from_the_pipeline(scheduler: Any, call: dict[str, Any]) -> None:
    call["cur_sampling_step"] = int((scheduler.timesteps == call["timestep"]).nonzero())
    call["dmd_noisy_tensor"] = first_latents(tuple(call["sample"].shape), 8)
    call["dmd_sigmas"] = scheduler.sigmas
    call["dmd_timesteps"] = call["all_timesteps"] = scheduler.timesteps


SETUPS = {
    "ConsistencyDecoderScheduler": Setup(steps=2),
    "DDPMWuerstchenScheduler": Setup(adapt=_batch_of_timesteps, unused_timesteps=1),
    "HeliosScheduler": Setup(config={"stages": 1}),
    "HeliosDMDScheduler": Setup(
        config={"stages": 1}, shape=(1, 3, 8, 2, 3), adapt=_noise_from_the_pipeline
    ),
    "PiflowScheduler": Setup(adapt=_grid_of_outputs),
    "RFD4ProteinaScheduler": Setup(
        config={
            "schedule_mode": "power",
            "noise_mode": "tan",
            "tsr_k": 1.5,
            "tsr_sigma": 0.8,
            "tail_steps": 0,
        },
        shape=(1, 8, 5),
        dim=1,
    ),
    "SCMScheduler": Setup(
        schedule={"intermediate_timesteps": None}, unused_timesteps=1
    ),
}


def _names() -> list[str]:
    found = []
    for name in sorted(dir(schedulers)):
        value = getattr(schedulers, name)
        # Dummies stand for classes whose dependencies are not installed.
        if (
            inspect.isclass(value)
            and name.endswith("Scheduler")
            and type(value).__name__ != "DummyObject"
        ):
            assert issubclass(value, SchedulerMixin)
            found.append(name)
    return found


def _call(
    setup: Setup, scheduler: Any, output: Any, t: Any, sample: Any, **kwargs: Any
) -> Any:
    """Pass what the signature requires, as a pipeline would."""
    parameters = inspect.signature(scheduler.step).parameters
    shape = tuple(sample.shape)
    extra = {
        "emit_mask": first_latents(shape[:-1], 7) > -1,
        "original_image": first_latents(shape, 8),
        "mask": (first_latents(shape, 9) > 0).float(),
        "timestep_back": t,
        "old_pred_original_sample": None,
    }
    call = {"model_output": output, "timestep": t, "sample": sample, **kwargs}
    for name, value in extra.items():
        if name in parameters and parameters[name].default is inspect.Parameter.empty:
            call[name] = value
    setup.adapt(scheduler, call)
    return scheduler.step(return_dict=False, **call)


def _run(name: str, **kwargs: Any) -> Run:
    setup = SETUPS.get(name, Setup())
    scheduler = getattr(schedulers, name)(**setup.config)
    if "state" in kwargs:
        scheduler = wrap_scheduler(scheduler)
    return denoise(
        scheduler,
        setup.shape,
        steps=setup.steps,
        dim=setup.dim,
        unused_timesteps=setup.unused_timesteps,
        begin=lambda scheduler, steps: scheduler.set_timesteps(steps, **setup.schedule),
        call=functools.partial(_call, setup),
        **kwargs,
    )


@pytest.mark.parametrize("kind", ["none", "one"])
@pytest.mark.parametrize(
    "name", [name for name in _names() if name not in {*REFUSED, *WITHOUT_STEP}]
)
def test_exact_patch_by_patch(name: str, kind: str) -> None:
    whole = _run(name, kind=kind)
    for patches, warmup in ((2, 0), (3, 2), (4, 1)):
        with session() as state:
            run = _run(
                name, kind=kind, state=state, warmup=warmup, borders=BORDERS[patches]
            )
        assert not differences(whole, run), (patches, warmup)


@pytest.mark.parametrize("name", [name for name in _names() if name in REFUSED])
def test_refused(name: str) -> None:
    wrapped = wrap_scheduler(getattr(schedulers, name)(**REFUSED[name]))
    tokens = torch.zeros(1, 8, 4, dtype=torch.long)
    arguments = [
        tokens
        for parameter in inspect.signature(wrapped.step).parameters.values()
        if parameter.default is inspect.Parameter.empty
    ]
    with session() as state:
        state.num_patches, state.latents_shape = 2, tuple(tokens.shape)
        state.start_pass(step=0, patch=0)
        state.latent_slice = LatentSlice(1, 0, 3)
        with pytest.raises(
            ValueError, match=f"Scheduler {name} is not supported by xFu"
        ):
            wrapped.step(*arguments)


def test_the_sweep_is_not_empty() -> None:
    assert len(_names()) > 35
