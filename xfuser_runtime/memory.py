"""What each rank holds: bytes of weights by component, and of the process or the device."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xfuser_runtime.distributed import get_pipeline_parallel_rank, get_world_group
from xfuser_runtime.distributed.collectives import gather_objects
from xfuser_runtime.pipelines.components import modules_of

_MIB = 2**20


@dataclass(frozen=True)
class RankMemory:
    """The memory of one rank, in bytes.

    Attributes:
        rank: in the world.
        stage: its pipeline stage.
        weights: parameters and buffers by component; of a tied parameter once.
        blocks: those of the transformers' blocks that this rank runs, part of `weights`.
        resident: allocated now on the device, or by the process on CPU.
        peak: the most that was.
    """

    rank: int
    stage: int
    weights: Mapping[str, int]
    blocks: int
    resident: int
    peak: int

    def line(self) -> str:
        """For a reader: `rank 0, stage 0: weights 12 MiB (...), blocks ...`."""
        parts = ", ".join(
            f"{name} {_mib(held)}" for name, held in self.weights.items() if held
        )
        return (
            f"rank {self.rank}, stage {self.stage}: weights "
            f"{_mib(sum(self.weights.values()))} MiB ({parts}), of which blocks "
            f"{_mib(self.blocks)}; resident {_mib(self.resident)}, peak {_mib(self.peak)}"
        )


def memory_of_all_ranks(pipeline: Any, device: torch.device) -> list[RankMemory]:
    """The memory of every rank, in rank order, on every rank; a collective call."""
    modules = modules_of(pipeline)
    group = get_world_group()
    resident = _resident(device)
    own = RankMemory(
        rank=group.rank_in_group,
        stage=get_pipeline_parallel_rank(),
        weights={name: bytes_of(module) for name, module in modules.items()},
        blocks=sum(bytes_of_blocks(module) for module in modules.values()),
        resident=resident,
        # The system counts a process's peak now and then only.
        peak=max(resident, peak_bytes(device)),
    )
    found: list[RankMemory] = gather_objects(own, group)
    return found


def bytes_of(module: nn.Module) -> int:
    """Bytes of the parameters and buffers of a module, those without storage left out."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(x.numel() * x.element_size() for x in tensors if not x.is_meta)


def bytes_of_blocks(module: nn.Module) -> int:
    """Bytes of the block lists of a ported transformer, 0 for any other module."""
    loops = getattr(type(module), "block_loops", ())
    return sum(bytes_of(getattr(module, loop)) for loop in loops)


def peak_bytes(device: torch.device) -> int:
    """The most memory allocated on the device, or resident in the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _resident(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return peak_bytes(device)
    return int(statm.read_text().split()[1]) * resource.getpagesize()


def _mib(count: int) -> str:
    return f"{count / _MIB:.1f}" if count < 100 * _MIB else f"{count / _MIB:.0f}"
