"""What a session runs with: degrees, run-time options and inputs, checked before any communication.

Field names are xDiT's. All classes are frozen: a checked configuration stays checked.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from xfuser_runtime.errors import ConfigError, NotSupportedError

#: What ``output_type`` may be in diffusers' image and video pipelines.
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(frozen=True)
class ParallelConfig:
    """How many ranks share which work; the product of all degrees is the world size.

    Args:
        data_parallel_degree: replicas, each with its own prompts.
        use_cfg_parallel: the two branches of classifier-free guidance on different ranks.
        ulysses_degree: ranks that exchange heads for rows in attention.
        ring_degree: ranks that pass keys and values round in attention.
        pipefusion_parallel_degree: stages of transformer blocks.
        tensor_parallel_degree: not implemented, 1 only.
        use_parallel_vae: not implemented, False only.

    Raises:
        ConfigError: a degree below 1.
        NotSupportedError: a field without an implementation is set.
    """

    data_parallel_degree: int = 1
    use_cfg_parallel: bool = False
    ulysses_degree: int = 1
    ring_degree: int = 1
    pipefusion_parallel_degree: int = 1
    tensor_parallel_degree: int = 1
    use_parallel_vae: bool = False

    def __post_init__(self) -> None:
        for entry in fields(self):
            if entry.name.endswith("_degree"):
                _check_at_least(entry.name, getattr(self, entry.name), 1)
        if self.tensor_parallel_degree > 1:
            raise NotSupportedError(
                f"tensor_parallel_degree={self.tensor_parallel_degree}, expected 1: tensor"
                " parallelism is not implemented; use ulysses_degree or ring_degree"
            )
        if self.use_parallel_vae:
            raise NotSupportedError(
                "use_parallel_vae, expected False: the parallel VAE is not implemented; leave it out"
            )

    @property
    def cfg_degree(self) -> int:
        """Ranks that share the guidance branches: 2 or 1."""
        return 2 if self.use_cfg_parallel else 1

    @property
    def sp_degree(self) -> int:
        """Shards of a sequence."""
        return self.ulysses_degree * self.ring_degree

    @property
    def world_size(self) -> int:
        """Ranks that the degrees ask for."""
        return math.prod(self.degrees().values())

    def degrees(self) -> dict[str, int]:
        """Degree of each dimension by flag name, slowest first."""
        return {
            "data_parallel_degree": self.data_parallel_degree,
            "use_cfg_parallel": self.cfg_degree,
            "pipefusion_parallel_degree": self.pipefusion_parallel_degree,
            "ring_degree": self.ring_degree,
            "ulysses_degree": self.ulysses_degree,
        }

    def check(self, world_size: int) -> None:
        """Raise unless the degrees multiply to ``world_size``.

        Raises:
            ConfigError: they do not; names the equation and the nearest layouts that do.
        """
        if self.world_size == world_size:
            return
        equation = " * ".join(f"{name}({n})" for name, n in self.degrees().items())
        near = "; ".join(
            _as_flags(layout) for layout in nearest_layouts(self, world_size)
        )
        raise ConfigError(
            f"{equation} = {self.world_size} ranks, expected the world size {world_size};"
            f" start {self.world_size} processes or use one of: {near}"
        )


def nearest_layouts(
    config: ParallelConfig, world_size: int, count: int = 3
) -> list[dict[str, int]]:
    """Degrees that multiply to ``world_size``, those that change least of ``config`` first.

    Layouts that turn on no further dimension come first, then smaller changes (in ratio).
    """
    wanted = tuple(config.degrees().values())
    names = tuple(config.degrees())

    def distance(degrees: tuple[int, ...]) -> tuple[int, float, int]:
        pairs = list(zip(degrees, wanted, strict=True))
        changed = sum(a != b for a, b in pairs)
        ratio = sum(abs(math.log2(a / b)) for a, b in pairs)
        turned_on = sum(a > 1 and b == 1 for a, b in pairs)
        return turned_on, ratio, changed

    legal = [
        degrees
        for degrees in _factorizations(world_size, len(names))
        if degrees[names.index("use_cfg_parallel")] <= 2
    ]
    return [
        dict(zip(names, degrees, strict=True))
        for degrees in sorted(legal, key=distance)[:count]
    ]


def _factorizations(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (number,)
        return
    for factor in range(1, number + 1):
        if number % factor == 0:
            for rest in _factorizations(number // factor, parts - 1):
                yield (factor, *rest)


def _as_flags(degrees: dict[str, int]) -> str:
    words = []
    for name, degree in degrees.items():
        if name == "use_cfg_parallel":
            words += ["--use_cfg_parallel"] if degree == 2 else []
        elif degree > 1:
            words.append(f"--{name} {degree}")
    return " ".join(words) or "no degree at all"


@dataclass(frozen=True)
class RuntimeConfig:
    """Options of a session that do not change its groups.

    Args:
        warmup_steps: synchronous steps before PipeFusion; 0 is allowed, attention then sees only
            the rows computed so far.
        num_pipeline_patch: patches of a PipeFusion step.
        use_torch_compile: compile the transformer blocks.
        use_fused_kernels: on CUDA give blocks that are not compiled the larger operations that
            compiled blocks get.
        use_cuda_graph: capture whole transformer calls on CUDA and replay them.
        attention_backend: kernel of the attention calls, None chooses.
        allow_unproven: run modes that ``porter verify`` has not proven, with a warning.
        text_encoders_on_first_rank: of each replica the first rank alone holds the encoders of text
            and images, and sends the others what they return.
    """

    warmup_steps: int = 1
    num_pipeline_patch: int = 1
    use_torch_compile: bool = False
    use_fused_kernels: bool = False
    use_cuda_graph: bool = True
    attention_backend: str | None = None
    allow_unproven: bool = False
    text_encoders_on_first_rank: bool = False

    def __post_init__(self) -> None:
        _check_at_least("warmup_steps", self.warmup_steps, 0)
        _check_at_least("num_pipeline_patch", self.num_pipeline_patch, 1)


@dataclass(frozen=True)
class EngineConfig:
    """All that is fixed for a session.

    Args:
        world_size: ranks that were started; None takes torchrun's ``WORLD_SIZE``, else 1.

    Raises:
        ConfigError: the degrees do not multiply to the world size.
    """

    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    runtime_config: RuntimeConfig = field(default_factory=RuntimeConfig)
    world_size: int | None = None

    def __post_init__(self) -> None:
        if self.world_size is None:
            object.__setattr__(self, "world_size", world_size_of_environment())
        assert self.world_size is not None
        self.parallel_config.check(self.world_size)


@dataclass(frozen=True)
class InputConfig:
    """Inputs of a pipeline call; None leaves a value to the pipeline's own default.

    Args:
        height, width: pixels.
        num_frames: of a video.
        batch_size: prompts; follows from ``prompt`` when None.
        num_inference_steps: denoising steps.
        num_images_per_prompt: images of each prompt.
        max_sequence_length: tokens of a prompt.
        seed: of the initial noise.
        output_type: as in diffusers.
    """

    prompt: str | tuple[str, ...] = ""
    negative_prompt: str | tuple[str, ...] | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    batch_size: int | None = None
    num_inference_steps: int = 20
    guidance_scale: float | None = None
    num_images_per_prompt: int = 1
    max_sequence_length: int | None = None
    seed: int = 42
    output_type: str = "pil"

    def __post_init__(self) -> None:
        for name in (
            "height",
            "width",
            "num_frames",
            "batch_size",
            "num_inference_steps",
            "num_images_per_prompt",
            "max_sequence_length",
        ):
            value = getattr(self, name)
            if value is not None:
                _check_at_least(name, value, 1)
        if self.output_type not in OUTPUT_TYPES:
            raise ConfigError(
                f"output_type {self.output_type!r}, expected one of {', '.join(OUTPUT_TYPES)}"
            )


def world_size_of_environment() -> int:
    """Processes that torchrun started, 1 without it.

    Raises:
        ConfigError: ``WORLD_SIZE`` is not a number.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            f"WORLD_SIZE={text!r} in the environment, expected a positive number; start with torchrun"
        )
    return int(text)


def _check_at_least(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r}, expected an integer of at least {least}")
