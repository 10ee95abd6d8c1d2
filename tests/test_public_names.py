"""The public interface, name by name: others build on it, so a name that moves fails here."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import xfuser_runtime

ROOT = Path(__file__).parents[1]

RUNTIME = [
    "EngineConfig",
    "ParallelConfig",
    "RuntimeConfig",
    "InputConfig",
    "xFuserArgs",
    "load_pipeline_class",
    "xFuserBaseWrapper",
    "xFuserModelBaseWrapper",
    "xFuserPipelineBaseWrapper",
    "xFuserPipelineWrapperRegister",
    "xFuserTransformerBaseWrapper",
    "xFuserTransformerWrappersRegister",
    "xFuserSchedulerBaseWrapper",
    "xFuserSchedulerWrappersRegister",
    "xFuserLayerBaseWrapper",
    "xFuserLayerWrappersRegister",
    "get_runtime_state",
    "initialize_runtime_state",
    "init_distributed_environment",
    "initialize_model_parallel",
    "get_world_group",
    "get_dp_group",
    "get_cfg_group",
    "get_pp_group",
    "get_sp_group",
    "get_pipeline_parallel_world_size",
    "get_pipeline_parallel_rank",
    "get_sequence_parallel_world_size",
    "get_sequence_parallel_rank",
    "get_classifier_free_guidance_world_size",
    "get_classifier_free_guidance_rank",
    "is_pipeline_first_stage",
    "is_pipeline_last_stage",
    "is_dp_last_group",
]

DISTRIBUTED = [n for n in RUNTIME if n.startswith(("get_", "is_", "init"))]

ATTRIBUTES = {
    "xFuserBaseWrapper": ["forward_check_condition"],
    "xFuserPipelineBaseWrapper": [
        "enable_data_parallel",
        "check_to_use_naive_forward",
        "_process_cfg_split_batch",
        "_sync_pipeline",
        "_async_pipeline",
    ],
    "xFuserTransformerBaseWrapper": [
        "forward_check_condition",
        "_get_patch_height_width",
        "submodule_classes_to_wrap",
        "submodule_name_to_wrap",
    ],
    "xFuserPipelineWrapperRegister": ["register"],
    "xFuserTransformerWrappersRegister": ["register"],
    "xFuserSchedulerWrappersRegister": ["register"],
    "xFuserLayerWrappersRegister": ["register"],
    "xFuserArgs": ["create_config", "add_cli_args", "from_cli_args"],
}

ENGINE_ARGUMENTS = {
    "data_parallel_degree": 1,
    "use_cfg_parallel": False,
    "ulysses_degree": 1,
    "ring_degree": 1,
    "pipefusion_parallel_degree": 1,
    "num_pipeline_patch": None,
    "warmup_steps": 1,
    "tensor_parallel_degree": 1,
    "use_parallel_vae": False,
    "use_torch_compile": False,
    "attention_backend": None,
    "allow_unproven": False,
}

COMMANDS = {
    "add-model": {"--output", "--check", "--diff", "--all", "--with"},
    "diff": set(),
    "check": set(),
    "verify": {"--modes"},
    "coverage": {"--json"},
    "list-rules": set(),
    "make-checkpoint": set(),
}


def test_the_package_exports_exactly_the_public_names() -> None:
    assert sorted(xfuser_runtime.__all__) == sorted(RUNTIME)
    assert set(RUNTIME) <= set(dir(xfuser_runtime))


@pytest.mark.parametrize("name", RUNTIME)
def test_runtime_name(name: str) -> None:
    value = getattr(xfuser_runtime, name)
    assert value.__name__ == name


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_generated_code_imports_it_from_distributed(name: str) -> None:
    distributed = importlib.import_module("xfuser_runtime.distributed")
    assert getattr(distributed, name) is getattr(xfuser_runtime, name)
    assert name in distributed.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'xFuserNothing'"):
        xfuser_runtime.xFuserNothing  # noqa: B018


@pytest.mark.parametrize(
    ("owner", "attribute"), [(o, a) for o, names in ATTRIBUTES.items() for a in names]
)
def test_attribute(owner: str, attribute: str) -> None:
    assert hasattr(getattr(xfuser_runtime, owner), attribute)


def test_the_runtime_state_takes_the_input_parameters() -> None:
    from xfuser_runtime.distributed import RuntimeState

    state = RuntimeState(xfuser_runtime.EngineConfig(world_size=1))
    state.set_input_parameters(height=8, width=8, batch_size=1, num_inference_steps=2)
    assert state.runtime_config.warmup_steps == 1


def test_the_arguments_of_the_engine_and_their_defaults() -> None:
    parameters = inspect.signature(xfuser_runtime.xFuserArgs).parameters
    assert {n: parameters[n].default for n in ENGINE_ARGUMENTS} == ENGINE_ARGUMENTS
    engine, inputs = xfuser_runtime.xFuserArgs(**ENGINE_ARGUMENTS).create_config(1)
    assert isinstance(engine, xfuser_runtime.EngineConfig)
    assert isinstance(inputs, xfuser_runtime.InputConfig)


def test_signatures() -> None:
    load = inspect.signature(xfuser_runtime.load_pipeline_class)
    assert list(load.parameters) == ["name", "generated"]
    assert load.parameters["generated"].default == "generated"
    split = xfuser_runtime.xFuserPipelineBaseWrapper._process_cfg_split_batch
    kinds = [p.kind for p in inspect.signature(split).parameters.values()]
    assert kinds[-1] is inspect.Parameter.VAR_POSITIONAL


def test_generated_names() -> None:
    names = importlib.import_module("porter.names")
    for kind, original, name in (
        ("pipeline", "PixArtAlphaPipeline", "xFuserPixArtAlphaPipeline"),
        ("transformer", "PixArtTransformer2DModel", "xFuserPixArtTransformer2DWrapper"),
        ("attention", "AttnProcessor2_0", "xFuserAttnProcessor2_0Wrapper"),
    ):
        assert names.wrapper_name(kind, original) == name


# -- command line ----------------------------------------------------------------------


def _commands() -> dict[str, Any]:
    typer = importlib.import_module("typer")
    cli = importlib.import_module("porter.cli")
    commands: dict[str, Any] = dict(typer.main.get_command(cli.app).commands)
    return commands


def test_the_commands_of_porter() -> None:
    assert set(_commands()) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_options_of_a_command(name: str) -> None:
    options = {option for p in _commands()[name].params for option in p.opts}
    assert COMMANDS[name] <= options


def test_arguments_of_the_commands() -> None:
    def arguments(name: str) -> list[tuple[str, int]]:
        return [
            (p.name, p.nargs)
            for p in _commands()[name].params
            if p.param_type_name == "argument"
        ]

    for name in ("add-model", "diff", "verify"):
        assert [nargs for _, nargs in arguments(name)] == [-1]
    assert [nargs for _, nargs in arguments("make-checkpoint")] == [1, 1]


def test_the_console_script() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["porter"] == "porter.cli:main"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["list-rules"], 0),
        (["add-model", "NoSuchPipeline"], 2),
        (["no-such-command"], 2),
    ],
)
def test_exit_codes(arguments: list[str], code: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "porter", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == code
    # Results on stdout, messages on stderr.
    assert bool(done.stdout) == (code == 0)
    assert bool(done.stderr) == (code != 0)
    assert "Traceback" not in done.stderr


def test_the_runtime_is_a_module_to_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "xfuser_runtime.run", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 0
    for name in ENGINE_ARGUMENTS:
        assert f"--{name}" in done.stdout
