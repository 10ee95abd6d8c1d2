"""What cannot be stepped patch by patch is refused, with the manual's ValueError."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_sde_ve import ScoreSdeVeScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from tests.runtime.schedulers.denoise import BORDERS, Run, denoise, differences, session
from xfuser_runtime.schedulers import wrap_scheduler

SHAPE = (1, 4, 8, 6)
MESSAGE = "Scheduler {} is not supported by xFuser"


@pytest.mark.parametrize(
    "original", [DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler]
)
@pytest.mark.parametrize("warmup", [0, 2])
def test_thresholding(original: type, warmup: int) -> None:
    with session() as state:
        with pytest.raises(
            ValueError, match=MESSAGE.format(original.__name__)
        ) as error:
            denoise(
                wrap_scheduler(original(thresholding=True)),
                SHAPE,
                state=state,
                warmup=warmup,
                borders=BORDERS[2],
            )
        assert state.step == 0, "refused before the first warm-up step"
    assert "thresholding" in str(error.value)
    assert "\n" not in str(error.value)


def test_thresholding_is_fine_on_whole_latents_and_on_one_patch() -> None:
    expected = denoise(DDIMScheduler(thresholding=True), SHAPE)
    with session() as state:
        run = denoise(
            wrap_scheduler(DDIMScheduler(thresholding=True)),
            SHAPE,
            state=state,
            borders=(0, 8),
        )
    assert not differences(expected, run)


def _changed(change: Any) -> type:
    class Changed(EulerDiscreteScheduler):
        def step(
            self,
            model_output: torch.Tensor,
            timestep: Any,
            sample: torch.Tensor,
            return_dict: bool = True,
        ) -> Any:
            model_output = change(self, model_output)
            return super().step(model_output, timestep, sample, return_dict=return_dict)

    return Changed


def _running_norm(scheduler: Any, output: torch.Tensor) -> torch.Tensor:
    # Kept for the next step, so the first step's result does not show it.
    last = getattr(scheduler, "norm", 1.0)
    scheduler.norm = float(output.norm())
    return output / last


@pytest.mark.parametrize(
    "change",
    {
        "mean": lambda s, x: x - 1e-3 * x.mean(),
        "quantile": lambda s, x: x / x.abs().flatten().quantile(0.99).clamp(min=1.0),
        "neighbour row": lambda s, x: x + 0.01 * x.roll(1, 2),
        "rows before": lambda s, x: x + 0.01 * x.cumsum(2),
        "rows after": lambda s, x: x + 0.01 * x.flip(2).cumsum(2).flip(2),
        "norm of the last step": _running_norm,
    }.items(),
    ids=lambda item: item[0],
)
def test_a_step_that_looks_at_other_rows(change: tuple[str, Any]) -> None:
    with (
        session() as state,
        pytest.raises(ValueError, match="changes with rows outside"),
    ):
        denoise(
            wrap_scheduler(_changed(change[1])()),
            SHAPE,
            state=state,
            warmup=1,
            borders=BORDERS[3],
        )


@pytest.mark.parametrize(
    ("name", "draw"),
    {
        "generator of numpy-like kind": lambda s, x: x
        + torch.empty_like(x).log_normal_(),
        "unwatched": lambda s, x: torch.nn.functional.dropout(x, 0.5),
    }.items(),
)
def test_unwatched_random_numbers(name: str, draw: Any) -> None:
    expected = denoise(_changed(draw)(), SHAPE)
    with session() as state:
        options = {"state": state, "borders": BORDERS[3]}
        wrapped = wrap_scheduler(_changed(draw)())
        if name == "unwatched":
            with pytest.raises(ValueError, match="random numbers past torch's"):
                denoise(wrapped, SHAPE, **options)
        else:
            assert not differences(expected, denoise(wrapped, SHAPE, **options))


def test_latents_of_another_shape() -> None:
    # A second modality in the same loop: its rows are not the latents' rows.
    def call(scheduler: Any, output: Any, t: Any, sample: Any, **kwargs: Any) -> Any:
        return scheduler.step(output[:, :, :5], t, sample[:, :, :5], **kwargs)

    with (
        session() as state,
        pytest.raises(ValueError, match="expected the same extent"),
    ):
        denoise(
            wrap_scheduler(EulerDiscreteScheduler()),
            SHAPE,
            state=state,
            borders=BORDERS[2],
            call=call,
        )


class _Carried:
    """Hands the predicted sample of one step to the next, as CogVideoX's pipelines do."""

    def __init__(self) -> None:
        self.predicted: Any = None
        self.last_timestep: Any = None

    def __call__(
        self, scheduler: Any, output: Any, t: Any, sample: Any, **kwargs: Any
    ) -> Any:
        timesteps = scheduler.timesteps
        index = int((timesteps == t).nonzero())
        result = scheduler.step(
            output,
            self.predicted,
            t,
            timesteps[index - 1] if index > 0 else None,
            sample,
            return_dict=False,
            **kwargs,
        )
        self.predicted = result[1]
        return result


def _cogvideox(**kwargs: Any) -> Run:
    return denoise(wrap_scheduler(CogVideoXDPMScheduler()), SHAPE, **kwargs)


@pytest.mark.parametrize("kind", ["none", "one"])
def test_an_output_that_the_pipeline_hands_back(kind: str) -> None:
    expected = denoise(CogVideoXDPMScheduler(), SHAPE, call=_Carried(), kind=kind)
    with session() as state:
        for patches, borders in BORDERS.items():
            run = _cogvideox(
                call=_Carried(), kind=kind, state=state, warmup=1, borders=borders
            )
            assert not differences(expected, run), patches


def test_patches_of_one_step_called_differently() -> None:
    # Without warm-up, the first patch has no prediction yet and the second one has.
    message = "patch 1 was called with other arguments"
    with session() as state, pytest.raises(ValueError, match=message):
        _cogvideox(call=_Carried(), state=state, borders=BORDERS[2])


def test_no_step_method() -> None:
    class Stepless(SchedulerMixin):
        pass

    with pytest.raises(ValueError, match=MESSAGE.format("Stepless")):
        wrap_scheduler(Stepless())


def test_predictor_is_exact_and_corrector_refused() -> None:
    def begin(scheduler: Any, steps: int) -> None:
        scheduler.set_timesteps(steps)
        scheduler.set_sigmas(steps)

    def predict(scheduler: Any, output: Any, t: Any, sample: Any) -> Any:
        return scheduler.step_pred(output, t, sample, return_dict=False)

    def correct(scheduler: Any, output: Any, t: Any, sample: Any) -> Any:
        return scheduler.step_correct(output, sample, return_dict=False)

    expected = denoise(ScoreSdeVeScheduler(), SHAPE, begin=begin, call=predict)
    with session() as state:
        options = {"state": state, "begin": begin, "borders": BORDERS[2]}
        wrapped = wrap_scheduler(ScoreSdeVeScheduler())
        run = denoise(wrapped, SHAPE, call=predict, **options)
        assert not differences(expected, run)
        with pytest.raises(ValueError, match="changes with rows outside"):
            denoise(wrapped, SHAPE, call=correct, **options)
