"""xFuserArgs: the flags of the command line and of Python callers, with xDiT's names."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

from xfuser_runtime.config import (
    OUTPUT_TYPES,
    EngineConfig,
    InputConfig,
    ParallelConfig,
    RuntimeConfig,
)


@dataclass
class xFuserArgs:
    """Everything a run can be told; ``create_config`` checks it.

    See ``ParallelConfig``, ``RuntimeConfig`` and ``InputConfig`` for the fields.
    ``num_pipeline_patch`` None stands for the number of stages. ``model`` is a checkpoint folder.
    """

    model: str | None = None
    # parallelism
    data_parallel_degree: int = 1
    use_cfg_parallel: bool = False
    ulysses_degree: int = 1
    ring_degree: int = 1
    pipefusion_parallel_degree: int = 1
    num_pipeline_patch: int | None = None
    warmup_steps: int = 1
    tensor_parallel_degree: int = 1
    use_parallel_vae: bool = False
    # run time
    use_torch_compile: bool = False
    use_fused_kernels: bool = False
    use_cuda_graph: bool = True
    attention_backend: str | None = None
    allow_unproven: bool = False
    text_encoders_on_first_rank: bool = False
    # inputs
    prompt: str | list[str] = ""
    negative_prompt: str | list[str] | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    num_inference_steps: int = 20
    guidance_scale: float | None = None
    num_images_per_prompt: int = 1
    max_sequence_length: int | None = None
    seed: int = 42
    output_type: str = "pil"

    def create_config(
        self, world_size: int | None = None
    ) -> tuple[EngineConfig, InputConfig]:
        """Checked configurations; nothing is communicated.

        Args:
            world_size: ranks that were started; None takes torchrun's ``WORLD_SIZE``, else 1.

        Raises:
            ConfigError: a value is out of range or the degrees do not multiply to the world size.
            NotSupportedError: a flag that nothing implements is set.
        """
        parallel_config = ParallelConfig(
            **{
                entry.name: getattr(self, entry.name)
                for entry in fields(ParallelConfig)
            }
        )
        patches = self.num_pipeline_patch
        runtime_config = RuntimeConfig(
            warmup_steps=self.warmup_steps,
            num_pipeline_patch=(
                parallel_config.pipefusion_parallel_degree
                if patches is None
                else patches
            ),
            use_torch_compile=self.use_torch_compile,
            use_fused_kernels=self.use_fused_kernels,
            use_cuda_graph=self.use_cuda_graph,
            attention_backend=self.attention_backend,
            allow_unproven=self.allow_unproven,
            text_encoders_on_first_rank=self.text_encoders_on_first_rank,
        )
        engine_config = EngineConfig(parallel_config, runtime_config, world_size)
        return engine_config, self._input_config()

    def _input_config(self) -> InputConfig:
        values = {
            entry.name: getattr(self, entry.name)
            for entry in fields(InputConfig)
            if entry.name != "batch_size"
        }
        for name in ("prompt", "negative_prompt"):
            if isinstance(values[name], list):
                values[name] = tuple(values[name])
        prompt = values["prompt"]
        size = len(prompt) if isinstance(prompt, tuple) else 1
        return InputConfig(batch_size=size or None, **values)

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add every field as a flag to ``parser``."""
        parser.add_argument(
            "--model", metavar="DIR", help="checkpoint folder, as diffusers saves it"
        )
        _add_parallel_flags(
            parser.add_argument_group(
                "parallelism (degrees multiply to the world size)"
            )
        )
        _add_runtime_flags(parser.add_argument_group("run time"))
        _add_input_flags(
            parser.add_argument_group("inputs (default: the pipeline's own)")
        )
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> xFuserArgs:
        """The fields out of a parsed command line; other attributes are left alone.

        One prompt becomes a string, several a list.
        """
        values = {
            entry.name: getattr(args, entry.name)
            for entry in fields(cls)
            if hasattr(args, entry.name)
        }
        for name in ("prompt", "negative_prompt"):
            given = values.get(name)
            if isinstance(given, list) and len(given) == 1:
                values[name] = given[0]
        return cls(**values)


def _add_parallel_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data_parallel_degree",
        type=int,
        default=1,
        metavar="N",
        help="replicas, each with its own prompts",
    )
    group.add_argument(
        "--use_cfg_parallel",
        action="store_true",
        help="guided and unguided branch on different ranks (degree 2)",
    )
    group.add_argument(
        "--ulysses_degree",
        type=int,
        default=1,
        metavar="N",
        help="sequence parallelism that exchanges heads for rows",
    )
    group.add_argument(
        "--ring_degree",
        type=int,
        default=1,
        metavar="N",
        help="sequence parallelism that passes keys and values round",
    )
    group.add_argument(
        "--pipefusion_parallel_degree",
        type=int,
        default=1,
        metavar="N",
        help="stages of transformer blocks",
    )
    group.add_argument(
        "--num_pipeline_patch",
        type=int,
        default=None,
        metavar="N",
        help="patches of a PipeFusion step (default: one a stage)",
    )
    group.add_argument(
        "--warmup_steps",
        type=int,
        default=1,
        metavar="N",
        help="synchronous steps before PipeFusion (default: 1)",
    )
    group.add_argument(
        "--tensor_parallel_degree",
        type=int,
        default=1,
        metavar="N",
        help="not implemented: refused above 1",
    )
    group.add_argument(
        "--use_parallel_vae", action="store_true", help="not implemented: refused"
    )


def _add_runtime_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--use_torch_compile",
        action="store_true",
        help="compile the transformer blocks",
    )
    group.add_argument(
        "--use_fused_kernels",
        action="store_true",
        help="on CUDA, larger operations in blocks that are not compiled",
    )
    group.add_argument(
        "--use_cuda_graph",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="capture whole transformer calls on CUDA and replay them (default: yes)",
    )
    group.add_argument(
        "--attention_backend",
        default=None,
        metavar="NAME",
        help="attention kernel (default: chosen for the device)",
    )
    group.add_argument(
        "--allow_unproven",
        action="store_true",
        help="run modes that `porter verify` has not proven, with a warning",
    )
    group.add_argument(
        "--text_encoders_on_first_rank",
        action="store_true",
        help="hold them on the first rank of each replica alone, which sends their results",
    )


def _add_input_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompt", nargs="*", default="", metavar="TEXT", help="one or more prompts"
    )
    group.add_argument(
        "--negative_prompt",
        nargs="*",
        default=None,
        metavar="TEXT",
        help="what the picture should not show",
    )
    group.add_argument("--height", type=int, metavar="PIXELS")
    group.add_argument("--width", type=int, metavar="PIXELS")
    group.add_argument("--num_frames", type=int, metavar="N", help="frames of a video")
    group.add_argument(
        "--num_inference_steps",
        type=int,
        default=20,
        metavar="N",
        help="denoising steps (default: 20)",
    )
    group.add_argument(
        "--guidance_scale",
        type=float,
        metavar="X",
        help="weight of classifier-free guidance",
    )
    group.add_argument("--num_images_per_prompt", type=int, default=1, metavar="N")
    group.add_argument(
        "--max_sequence_length", type=int, metavar="TOKENS", help="longest prompt"
    )
    group.add_argument(
        "--seed", type=int, default=42, help="of the initial noise (default: 42)"
    )
    group.add_argument("--output_type", choices=OUTPUT_TYPES, default="pil")
