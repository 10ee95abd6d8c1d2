"""xFuserArgs: xDiT's names, on the command line and in Python."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys

import pytest

from xfuser_runtime.args import xFuserArgs
from xfuser_runtime.config import InputConfig, ParallelConfig
from xfuser_runtime.errors import ConfigError, NotSupportedError


def _parse(*words: str) -> xFuserArgs:
    parser = xFuserArgs.add_cli_args(argparse.ArgumentParser())
    return xFuserArgs.from_cli_args(parser.parse_args(words))


def test_an_empty_command_line_is_the_default() -> None:
    assert _parse() == xFuserArgs()


def test_every_field_is_a_flag_that_arrives() -> None:
    """A field without a flag, or a flag that is dropped on the way, fails here."""
    given = {
        "model": "folder",
        "data_parallel_degree": 2,
        "use_cfg_parallel": True,
        "ulysses_degree": 3,
        "ring_degree": 4,
        "pipefusion_parallel_degree": 5,
        "num_pipeline_patch": 6,
        "warmup_steps": 7,
        "tensor_parallel_degree": 8,
        "use_parallel_vae": True,
        "use_torch_compile": True,
        "use_fused_kernels": True,
        "use_cuda_graph": True,
        "attention_backend": "cudnn",
        "allow_unproven": True,
        "text_encoders_on_first_rank": True,
        "prompt": ["a cat", "a dog"],
        "negative_prompt": "blurred",
        "height": 512,
        "width": 768,
        "num_frames": 9,
        "num_inference_steps": 10,
        "guidance_scale": 1.5,
        "num_images_per_prompt": 11,
        "max_sequence_length": 12,
        "seed": 13,
        "output_type": "latent",
    }
    assert set(given) == {field.name for field in dataclasses.fields(xFuserArgs)}
    words: list[str] = []
    for name, value in given.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}"] + ([] if value is True else [str(v) for v in values])
    assert dataclasses.asdict(_parse(*words)) == given


def test_what_is_on_by_default_can_be_turned_off() -> None:
    assert not _parse("--no-use_cuda_graph").use_cuda_graph
    assert xFuserArgs().create_config()[0].runtime_config.use_cuda_graph


def test_the_configurations_hold_what_was_given() -> None:
    engine, inputs = xFuserArgs(
        use_cfg_parallel=True,
        pipefusion_parallel_degree=4,
        warmup_steps=2,
        attention_backend="math",
        allow_unproven=True,
        text_encoders_on_first_rank=True,
        prompt=["a", "b"],
        height=64,
        seed=1,
    ).create_config(world_size=8)
    assert engine.parallel_config == ParallelConfig(
        use_cfg_parallel=True, pipefusion_parallel_degree=4
    )
    assert engine.runtime_config.warmup_steps == 2
    assert engine.runtime_config.attention_backend == "math"
    assert engine.runtime_config.allow_unproven
    assert engine.runtime_config.text_encoders_on_first_rank
    assert inputs == InputConfig(prompt=("a", "b"), batch_size=2, height=64, seed=1)
    assert inputs.width is None


@pytest.mark.parametrize(
    ("stages", "given", "patches"), [(1, None, 1), (4, None, 4), (4, 2, 2), (2, 5, 5)]
)
def test_patches_default_to_the_number_of_stages(
    stages: int, given: int | None, patches: int
) -> None:
    args = xFuserArgs(pipefusion_parallel_degree=stages, num_pipeline_patch=given)
    engine, _ = args.create_config(world_size=stages)
    assert engine.runtime_config.num_pipeline_patch == patches


def test_the_batch_follows_from_the_prompts() -> None:
    assert xFuserArgs(prompt="a").create_config(1)[1].batch_size == 1
    assert xFuserArgs(prompt=["a", "b", "c"]).create_config(1)[1].batch_size == 3
    assert xFuserArgs(prompt=[]).create_config(1)[1].batch_size is None


def test_errors_come_before_anything_is_communicated() -> None:
    with pytest.raises(ConfigError, match="= 2 ranks, expected the world size 1"):
        xFuserArgs(ulysses_degree=2).create_config(world_size=1)
    with pytest.raises(NotSupportedError, match="tensor"):
        xFuserArgs(tensor_parallel_degree=2).create_config(world_size=2)
    with pytest.raises(NotSupportedError, match="use_parallel_vae"):
        xFuserArgs(use_parallel_vae=True).create_config(world_size=1)


@pytest.mark.parametrize("words", [("--use_onediff",), ("--output_type", "png")])
def test_unknown_flags_are_refused(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        _parse(*words)
    assert "error:" in capsys.readouterr().err


def test_flags_need_no_torch() -> None:
    code = (
        "import sys; from xfuser_runtime import xFuserArgs; xFuserArgs().create_config();"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
