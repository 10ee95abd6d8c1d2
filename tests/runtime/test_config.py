"""Configurations are checked before anything is communicated."""

from __future__ import annotations

import dataclasses
import math

import pytest

from xfuser_runtime.config import (
    EngineConfig,
    InputConfig,
    ParallelConfig,
    RuntimeConfig,
    nearest_layouts,
)
from xfuser_runtime.errors import ConfigError, NotSupportedError, XFuserError


def test_the_defaults_are_one_process() -> None:
    config = ParallelConfig()
    assert (config.world_size, config.cfg_degree, config.sp_degree) == (1, 1, 1)
    config.check(1)


def test_degrees_multiply() -> None:
    config = ParallelConfig(
        data_parallel_degree=3,
        use_cfg_parallel=True,
        ulysses_degree=5,
        ring_degree=7,
        pipefusion_parallel_degree=11,
    )
    assert config.world_size == 3 * 2 * 5 * 7 * 11
    assert config.sp_degree == 35
    config.check(2310)


def test_a_wrong_product_names_the_equation_and_the_nearest_layouts() -> None:
    config = ParallelConfig(use_cfg_parallel=True, ulysses_degree=3)
    with pytest.raises(ConfigError) as caught:
        config.check(8)
    assert str(caught.value) == (
        "data_parallel_degree(1) * use_cfg_parallel(2) * pipefusion_parallel_degree(1)"
        " * ring_degree(1) * ulysses_degree(3) = 6 ranks, expected the world size 8;"
        " start 6 processes or use one of: --use_cfg_parallel --ulysses_degree 4;"
        " --ulysses_degree 8; --use_cfg_parallel --ring_degree 2 --ulysses_degree 2"
    )


def test_the_nearest_layout_of_one_process_is_no_degree() -> None:
    with pytest.raises(ConfigError, match="use one of: no degree at all$"):
        ParallelConfig(ring_degree=2).check(1)


@pytest.mark.parametrize("world_size", [1, 2, 6, 7, 8, 12])
@pytest.mark.parametrize(
    "config",
    [
        ParallelConfig(),
        ParallelConfig(use_cfg_parallel=True, pipefusion_parallel_degree=4),
        ParallelConfig(data_parallel_degree=2, ring_degree=3),
    ],
)
def test_nearest_layouts_are_legal(config: ParallelConfig, world_size: int) -> None:
    layouts = nearest_layouts(config, world_size)
    assert layouts
    for degrees in layouts:
        assert math.prod(degrees.values()) == world_size
        given = dict(degrees)
        given["use_cfg_parallel"] = given["use_cfg_parallel"] == 2
        ParallelConfig(**given).check(world_size)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True])
@pytest.mark.parametrize(
    "name",
    [
        "data_parallel_degree",
        "ulysses_degree",
        "ring_degree",
        "pipefusion_parallel_degree",
        "tensor_parallel_degree",
    ],
)
def test_degrees_are_positive_integers(name: str, value: object) -> None:
    with pytest.raises(
        ConfigError, match=f"^{name}=.*expected an integer of at least 1"
    ):
        ParallelConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"tensor_parallel_degree": 2}, "tensor_parallel_degree=2, expected 1"),
        ({"use_parallel_vae": True}, "use_parallel_vae, expected False"),
    ],
)
def test_what_nothing_implements_is_refused_in_one_line(
    field: dict[str, int], message: str
) -> None:
    with pytest.raises(NotSupportedError, match=message) as caught:
        ParallelConfig(**field)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, XFuserError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps=-1, expected an integer of at least 0"),
        ({"num_pipeline_patch": 0}, "num_pipeline_patch=0"),
    ],
)
def test_runtime_config_is_checked(field: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RuntimeConfig(**field)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"height": 0}, "height=0"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"num_images_per_prompt": -2}, "num_images_per_prompt=-2"),
        (
            {"output_type": "png"},
            "output_type 'png', expected one of pil, np, pt, latent",
        ),
    ],
)
def test_input_config_is_checked(field: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InputConfig(**field)  # type: ignore[arg-type]


def test_the_engine_takes_the_world_size_of_torchrun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert EngineConfig(ParallelConfig(ring_degree=4)).world_size == 4
    with pytest.raises(ConfigError, match="= 2 ranks, expected the world size 4"):
        EngineConfig(ParallelConfig(ring_degree=2))
    assert EngineConfig(ParallelConfig(ring_degree=2), world_size=2).world_size == 2
    monkeypatch.delenv("WORLD_SIZE")
    assert EngineConfig().world_size == 1
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(
        ConfigError, match="WORLD_SIZE='many' .* expected a positive number"
    ):
        EngineConfig()


@pytest.mark.parametrize(
    "config",
    [ParallelConfig(), RuntimeConfig(), EngineConfig(world_size=1), InputConfig()],
)
def test_configurations_are_frozen_and_hashable(config: object) -> None:
    name = dataclasses.fields(config)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, None)
    hash(config)
