"""A wrapped scheduler is the upstream one wherever diffusers or a pipeline looks."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)

from tests.runtime.schedulers.denoise import BORDERS, denoise, differences, session
from xfuser_runtime.distributed.runtime_state import LatentSlice
from xfuser_runtime.schedulers import (
    wrap_scheduler,
    xFuserSchedulerBaseWrapper,
    xFuserSchedulerWrappersRegister,
)

CLASSES = [
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
]
SHAPE = (1, 4, 8, 6)


@pytest.mark.parametrize("original", CLASSES)
def test_class_and_signatures_are_upstreams(original: type) -> None:
    stock, scheduler = original(), original()
    wrapped = wrap_scheduler(scheduler)
    assert wrapped is scheduler
    assert wrap_scheduler(wrapped) is wrapped
    assert isinstance(wrapped, original)
    assert isinstance(wrapped, xFuserSchedulerBaseWrapper)
    assert wrapped.__class__ is original
    assert type(wrapped).__name__ == f"xFuser{original.__name__}Wrapper"
    assert type(wrapped) is type(wrap_scheduler(original()))
    for name in ("step", "scale_model_input", "set_timesteps", "add_noise"):
        if hasattr(stock, name):
            bound, unbound = getattr(wrapped, name), getattr(type(wrapped), name)
            assert inspect.signature(bound) == inspect.signature(getattr(stock, name))
            assert inspect.signature(unbound) == inspect.signature(
                getattr(original, name)
            )
            assert inspect.getfullargspec(bound) == inspect.getfullargspec(
                getattr(stock, name)
            )
    assert original.step is vars(original)["step"], "upstream's class must not change"


@pytest.mark.parametrize("original", CLASSES)
def test_save_then_stock_load(original: type, tmp_path: Path) -> None:
    wrapped = wrap_scheduler(original(num_train_timesteps=321))
    wrapped.save_pretrained(tmp_path / "wrapped")
    original(num_train_timesteps=321).save_pretrained(tmp_path / "stock")
    name = "scheduler_config.json"
    assert (tmp_path / "wrapped" / name).read_text() == (
        tmp_path / "stock" / name
    ).read_text()
    loaded = original.from_pretrained(tmp_path / "wrapped")
    assert type(loaded) is original
    assert loaded.config.num_train_timesteps == 321
    assert repr(wrapped) == repr(original(num_train_timesteps=321))


def test_from_config_both_ways() -> None:
    wrapped = wrap_scheduler(DDIMScheduler(beta_schedule="scaled_linear"))
    same = type(wrapped).from_config(wrapped.config, num_train_timesteps=500)
    assert type(same) is DDIMScheduler
    assert same.config.beta_schedule == "scaled_linear"
    assert same.config.num_train_timesteps == 500
    other = UniPCMultistepScheduler.from_config(wrapped.config)
    assert other.config.beta_schedule == "scaled_linear"
    assert dict(other.config) == dict(
        UniPCMultistepScheduler.from_config(
            DDIMScheduler(beta_schedule="scaled_linear").config
        ).config
    )
    assert set(wrapped.compatibles) == set(DDIMScheduler().compatibles)


def test_pipeline_saves_upstreams_class(tmp_path: Path) -> None:
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        add_attention=False,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    pipeline = DDIMPipeline(unet=unet, scheduler=DDIMScheduler())
    pipeline.scheduler = wrap_scheduler(pipeline.scheduler)
    pipeline.save_pretrained(tmp_path)
    loaded = DDIMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is DDIMScheduler
    rebuilt = DDIMPipeline(unet=unet, scheduler=pipeline.scheduler)
    assert rebuilt.config["scheduler"] == ("diffusers", "DDIMScheduler")


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda s: pickle.loads(pickle.dumps(s))]
)
@pytest.mark.parametrize("original", CLASSES)
def test_copies_go_on_alone(original: type, copied: Any) -> None:
    wrapped = wrap_scheduler(original())
    twin = copied(wrapped)
    assert type(twin) is type(wrapped)
    expected = denoise(original(), SHAPE)
    with session() as state:
        options = {"state": state, "warmup": 1, "borders": BORDERS[3]}
        assert not differences(expected, denoise(twin, SHAPE, **options))
        assert not differences(expected, denoise(wrapped, SHAPE, **options))


def test_deepcopy_within_a_patch_pass_holds_that_patch() -> None:
    wrapped = wrap_scheduler(EulerDiscreteScheduler())
    wrapped.set_timesteps(4)
    latents = torch.randn(SHAPE)
    with session() as state:
        state.num_patches, state.latents_shape = 2, SHAPE
        for patch in (0, 1):
            state.start_pass(step=0, patch=patch)
            state.latent_slice = LatentSlice(2, 4 * patch, 4 * patch + 4)
            wrapped.scale_model_input(latents, wrapped.timesteps[0])
            if patch == 0:
                wrapped.step(latents, wrapped.timesteps[0], latents)
                assert copy.deepcopy(wrapped).step_index == 1
        assert copy.deepcopy(wrapped).step_index == 0


def test_registered_wrapper_is_used() -> None:
    class Fine(EulerDiscreteScheduler):
        pass

    @xFuserSchedulerWrappersRegister.register(Fine)
    class xFuserFineWrapper(xFuserSchedulerBaseWrapper, Fine):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            return super().step(*args, **kwargs)

    wrapped = wrap_scheduler(Fine())
    assert type(wrapped) is xFuserFineWrapper
    assert wrapped.__class__ is Fine
    expected = denoise(Fine(), SHAPE)
    with session() as state:
        run = denoise(wrapped, SHAPE, state=state, borders=BORDERS[2])
    assert not differences(expected, run)


def test_second_class_of_the_same_name_gets_its_own_wrapper() -> None:
    def make() -> type:
        class Local(EulerDiscreteScheduler):
            pass

        return Local

    for original in (make(), make()):
        assert isinstance(wrap_scheduler(original()), original)


def test_wrapped_scheduler_works_without_a_session() -> None:
    expected = denoise(DDIMScheduler(), SHAPE)
    assert not differences(expected, denoise(wrap_scheduler(DDIMScheduler()), SHAPE))
