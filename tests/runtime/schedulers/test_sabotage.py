"""Each mechanism broken on purpose: the comparison with the whole step must catch it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from tests.runtime.schedulers.denoise import BORDERS, denoise, differences, session
from xfuser_runtime.schedulers import copies as copies_module
from xfuser_runtime.schedulers import elementwise, wrap_scheduler
from xfuser_runtime.schedulers import step as step_module
from xfuser_runtime.schedulers.copies import PatchCopies
from xfuser_runtime.schedulers.draws import StepDraws
from xfuser_runtime.schedulers.step import StepCall
from xfuser_runtime.schedulers.trees import Region

SHAPE = (2, 4, 8, 6)


def _found(make: Callable[[], Any], warmup: int = 1, **kwargs: Any) -> list[str]:
    """Differences to the whole step; an error that the run itself raises counts."""
    expected = denoise(make(), SHAPE, **kwargs)
    with session() as state:
        try:
            run = denoise(
                wrap_scheduler(make()),
                SHAPE,
                state=state,
                warmup=warmup,
                borders=BORDERS[3],
                **kwargs,
            )
        except (ValueError, IndexError) as error:
            return [str(error)]
    return differences(expected, run)


def _sde() -> Any:
    return DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")


@pytest.mark.parametrize(
    "make", [_sde, EulerAncestralDiscreteScheduler, UniPCMultistepScheduler]
)
def test_unbroken(make: Callable[[], Any]) -> None:
    assert not _found(make)


def test_a_copy_stepped_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    run_upstream = StepCall._run_upstream

    def twice(self: StepCall) -> Any:
        result = run_upstream(self)
        if self._state.patch == 1 and self._state.step == 2:
            run_upstream(self)
        return result

    monkeypatch.setattr(StepCall, "_run_upstream", twice)
    monkeypatch.setattr(step_module, "CHECKED_STEPS", 0)
    assert _found(lambda: PNDMScheduler(skip_prk_steps=True)) == ["latents"]
    # This one runs out of its schedule, too.
    assert _found(DPMSolverMultistepScheduler)


def test_noise_drawn_per_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepDraws, "replay", StepDraws.record)
    monkeypatch.setattr(step_module, "CHECKED_STEPS", 0)
    for kind in ("none", "one", "list"):
        assert set(_found(EulerAncestralDiscreteScheduler, kind=kind)) >= {
            "latents",
            "random state",
        }


def test_one_state_for_all_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatchCopies, "activate", lambda self, scheduler, patch: None)
    monkeypatch.setattr(step_module, "CHECKED_STEPS", 0)
    for make in (EulerDiscreteScheduler, DPMSolverMultistepScheduler):
        assert _found(make)


def test_history_lists_shared_between_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    shallow = copies_module.without_copies
    monkeypatch.setattr(copies_module, "copied_attributes", shallow)
    monkeypatch.setattr(step_module, "CHECKED_STEPS", 0)
    assert _found(UniPCMultistepScheduler)


def test_rows_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(self: Region, tensor: Any) -> Any:
        start = max(self.start - 1, 0)
        return tensor.narrow(self.dim, start, self.stop - self.start)

    monkeypatch.setattr(Region, "rows", shifted)
    monkeypatch.setattr(step_module, "CHECKED_STEPS", 0)
    assert "latents" in _found(EulerDiscreteScheduler)


def test_history_of_one_patch_taken_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies_module, "merge", lambda values, regions: values[-1])
    from tests.runtime.schedulers.test_calls import test_whole_step_after_patches

    with pytest.raises(AssertionError):
        test_whole_step_after_patches(UniPCMultistepScheduler)


def test_the_measurement_off(monkeypatch: pytest.MonkeyPatch) -> None:
    # A step over all rows is wrong, not only refused: the measurement is what stops it.
    class Mean(EulerDiscreteScheduler):
        def step(
            self,
            model_output: Any,
            timestep: Any,
            sample: Any,
            return_dict: bool = True,
        ) -> Any:
            output = model_output - model_output.mean()
            return super().step(output, timestep, sample, return_dict=return_dict)

    assert "changes with rows outside" in _found(Mean)[0]
    monkeypatch.setattr(step_module, "CHECKED_STEPS", 0)
    assert _found(Mean) == ["latents", "other outputs"]


def test_thresholding_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Any:
        return DPMSolverMultistepScheduler(thresholding=True, sample_max_value=9.0)

    assert "thresholding" in _found(make)[0]
    monkeypatch.setattr(step_module, "refuse_config", lambda scheduler: None)
    # Then the measurement stops it.
    assert "changes with rows outside" in _found(make)[0]
    monkeypatch.setattr(step_module, "CHECKED_STEPS", 0)
    assert _found(make) == ["latents"]
    assert elementwise.refuse_config is not step_module.refuse_config
