"""One run of a pipeline: device, loading, the timed call, and the pictures."""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import diffusers
import torch
import transformers

from xfuser_runtime.config import EngineConfig
from xfuser_runtime.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    destroy_runtime_state,
    get_data_parallel_rank,
    get_world_group,
)
from xfuser_runtime.distributed.collectives import all_reduce_max
from xfuser_runtime.distributed.launch import fail_together, prepare_environment
from xfuser_runtime.images import image_difference, save_output
from xfuser_runtime.memory import RankMemory, memory_of_all_ranks, peak_bytes


@dataclass(frozen=True)
class Report:
    """What a run took. Times are of this rank, memory is the largest of all ranks.

    Attributes:
        layout: the degrees above 1, for example `cfg 2 x ulysses 2`.
        load_seconds, run_seconds: loading the checkpoint; the pipeline call.
        step_seconds: the call by its number of steps, text encoding and VAE included.
        peak_bytes: memory allocated on the device, or the process's memory on CPU.
        memory: of each rank, None unless asked for.
    """

    name: str
    layout: str
    world_size: int
    load_seconds: float
    run_seconds: float
    step_seconds: float
    peak_bytes: int
    memory: list[RankMemory] | None = None

    def lines(self) -> str:
        """The report for a reader."""
        ranks = f" on {self.world_size} ranks" if self.world_size > 1 else ""
        lines = [
            f"{self.name}: {self.layout}{ranks}",
            f"load {self.load_seconds:.2f} s, run {self.run_seconds:.2f} s "
            f"({self.step_seconds:.3f} s a step), "
            f"peak memory {self.peak_bytes / 2**20:.0f} MiB a rank",
        ]
        return "\n".join(lines + [held.line() for held in self.memory or []])


def layout_name(config: EngineConfig) -> str:
    """The degrees above 1, outermost first: `cfg 2 x stages 2 (3 patches, warm-up 1)`."""
    parallel, runtime = config.parallel_config, config.runtime_config
    degrees = {
        "data": parallel.data_parallel_degree,
        "cfg": parallel.cfg_degree,
        "stages": parallel.pipefusion_parallel_degree,
        "ring": parallel.ring_degree,
        "ulysses": parallel.ulysses_degree,
    }
    used = {name: f"{name} {n}" for name, n in degrees.items() if n > 1}
    if "stages" in used and runtime.num_pipeline_patch > 1:
        patches = (
            f"{runtime.num_pipeline_patch} patches, warm-up {runtime.warmup_steps}"
        )
        used["stages"] += f" ({patches})"
    return " x ".join(used.values()) or "one process"


@dataclass
class Session:
    """A loaded pipeline on this rank.

    Attributes:
        pipeline: stock or wrapped, on its device.
        rank: in the world.
        load_seconds, run_seconds: of loading, and of the last call.
    """

    pipeline: Any
    device: torch.device
    engine_config: EngineConfig
    rank: int
    load_seconds: float
    run_seconds: float = 0.0

    def call(self, arguments: dict[str, Any]) -> Any:
        """The pipeline's output, None on ranks that have none; timed."""
        start = self._now()
        output = self.pipeline(**arguments)
        self.run_seconds = self._now() - start
        return output

    def report(self, name: str, num_steps: int, *, with_memory: bool = False) -> Report:
        """What loading and the last call took; a collective call.

        Args:
            name: of the pipeline.
            num_steps: of the call.
            with_memory: also what each rank holds.
        """
        return Report(
            name=name,
            layout=layout_name(self.engine_config),
            world_size=self.engine_config.parallel_config.world_size,
            load_seconds=self.load_seconds,
            run_seconds=self.run_seconds,
            step_seconds=self.run_seconds / num_steps,
            peak_bytes=self._peak_bytes(),
            memory=(
                memory_of_all_ranks(self.pipeline, self.device) if with_memory else None
            ),
        )

    def _peak_bytes(self) -> int:
        value = torch.tensor(
            peak_bytes(self.device), dtype=torch.int64, device=self.device
        )
        return int(all_reduce_max(value, get_world_group()))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@contextlib.contextmanager
def open_session(
    cls: Any,
    folder: Path,
    engine_config: EngineConfig,
    *,
    stock: bool,
    dtype: str | None,
    tracebacks: bool = False,
) -> Iterator[Session]:
    """Load `cls` from `folder` on this rank's device; a rank that fails ends all ranks.

    Args:
        cls: a generated class, or an upstream class if `stock`.
        dtype: name of the weights' dtype; None is float32 on CPU, bfloat16 on CUDA.
        tracebacks: show the traceback of every error on the rank that raised it.
    """
    joined_before = torch.distributed.is_initialized()
    shown = _shown_tracebacks() if tracebacks else contextlib.nullcontext()
    with fail_together(), shown:
        prepare_environment(engine_config)
        yield _load(cls, folder, engine_config, stock=stock, dtype=dtype)
    destroy_runtime_state()
    destroy_model_parallel()
    if not joined_before:
        destroy_distributed_environment()


@contextlib.contextmanager
def _shown_tracebacks() -> Iterator[None]:
    try:
        yield
    except Exception:
        traceback.print_exc()
        raise


def _load(
    cls: Any,
    folder: Path,
    engine_config: EngineConfig,
    *,
    stock: bool,
    dtype: str | None,
) -> Session:
    rank = get_world_group().rank_in_group
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    default = "bfloat16" if device.type == "cuda" else "float32"
    options = {_dtype_keyword(): getattr(torch, dtype or default)}
    if rank:
        # One rank shows progress; the bars of all would overwrite each other.
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    start = time.perf_counter()
    if stock:
        pipeline = cls.from_pretrained(folder, **options)
    else:
        pipeline = cls.from_pretrained(folder, engine_config, **options)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=rank != 0)
    seconds = time.perf_counter() - start
    return Session(pipeline, device, engine_config, rank, seconds)


def _dtype_keyword() -> str:
    """The name that this diffusers' `from_pretrained` takes without a deprecation."""
    major, minor = diffusers.__version__.split(".")[:2]
    return "dtype" if (int(major), int(minor)) >= (0, 42) else "torch_dtype"


def save(
    output: Any, path: Path, reference: Path | None, stream: TextIO = sys.stdout
) -> None:
    """Write the pictures and tell `stream`; with `reference`, how far the first is from it."""
    replica = get_data_parallel_rank()
    files = save_output(output, path, replica=replica)
    for file in files:
        print(f"saved {file}", file=stream, flush=True)
    if reference is not None and replica == 0:
        mean, largest = image_difference(files[0], reference)
        text = f"mean {mean:.4f}, largest {largest} of 255 levels"
        print(f"difference from {reference}: {text}", file=stream, flush=True)
