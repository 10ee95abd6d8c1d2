"""Ports of three pipelines, tiny models of them, and calls on forked ranks.

A model is built once in the test process; every rank inherits it by the fork and wraps its
own copy, so a test costs a fork and the calls that it makes.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from porter.generate import plan
from porter.shrink import call_kwargs, make_pipeline
from porter.verify.gate import relative_error
from tests.ranks import run_ranks
from xfuser_runtime import xFuserArgs
from xfuser_runtime.config import EngineConfig
from xfuser_runtime.loader import load_pipeline_class, load_upstream_class
from xfuser_runtime.proofs import UnprovenWarning

PIXART = "PixArtAlphaPipeline"
JOINT = "tests.toys.joint_pipeline:ToyJointPipeline"
BATCHED = "tests.toys.batched_pipeline:ToyBatchedPipeline"
PIPELINES = (PIXART, JOINT, BATCHED)
STEPS = 4

#: Relative L2 of final latents over four guided steps in fp32; the gate of `porter verify`.
GATE = 1e-5
#: What a sabotage must reach to count as caught.
CAUGHT = 30 * GATE

MODES: Mapping[str, Mapping[str, Any]] = {
    "cfg2": {"use_cfg_parallel": True},
    "ulysses2": {"ulysses_degree": 2},
    "ring2": {"ring_degree": 2},
    "pp2": {
        "pipefusion_parallel_degree": 2,
        "num_pipeline_patch": 1,
        "warmup_steps": STEPS,
    },
    "pipefusion": {
        "pipefusion_parallel_degree": 2,
        "num_pipeline_patch": 2,
        "warmup_steps": 1,
    },
    "dp2": {"data_parallel_degree": 2},
}
#: Modes whose result is stock's, up to rounding.
EXACT = tuple(mode for mode in MODES if mode != "pipefusion")

Change = Callable[[int, Any], None]


@dataclass(frozen=True)
class Workshop:
    """The folder of the ports and the stock pipelines.

    Attributes:
        folder: where porter writes.
    """

    folder: Path
    _stock: dict[str, Any] = field(default_factory=dict)
    _wrappers: dict[str, Any] = field(default_factory=dict)

    def stock(self, name: str) -> Any:
        """A fresh copy of the tiny stock pipeline; weights are shared by all ranks' forks."""
        if name not in self._stock:
            pipeline = make_pipeline(load_upstream_class(name))
            pipeline.set_progress_bar_config(disable=True)
            self._stock[name] = pipeline
        return copy.deepcopy(self._stock[name])

    def wrapper(self, name: str) -> Any:
        """The generated class; ports are made on first use."""
        if name not in self._wrappers:
            plan([name], self.folder).write(self.folder)
            self._wrappers[name] = load_pipeline_class(name, generated=self.folder)
        return self._wrappers[name]

    def run(
        self,
        name: str,
        mode: str | Mapping[str, Any],
        body: Callable[[int, Any], Any],
        *,
        before: Change | None = None,
        wrap: bool = True,
        timeout: float = 120,
    ) -> list[Any]:
        """Results of `body(rank, pipeline)` on the ranks of `mode`, in rank order.

        Args:
            name: of the pipeline.
            mode: a name in `MODES`, or flags.
            body: runs on each rank with the wrapped pipeline.
            before: runs on each rank with the stock pipeline, before it is wrapped.
            wrap: False hands the stock pipeline to `body`.
            timeout: seconds.
        """
        flags = MODES[mode] if isinstance(mode, str) else mode
        wrapper, pipeline = self.wrapper(name), self.stock(name)

        def rank_main(rank: int) -> Any:
            # Unproven modes are what is tested.
            warnings.simplefilter("ignore", UnprovenWarning)
            if before is not None:
                before(rank, pipeline)
            made = wrapper(pipeline, engine(flags)) if wrap else pipeline
            return body(rank, made)

        return run_ranks(rank_main, world_size_of(flags), timeout=timeout)


def world_size_of(flags: Mapping[str, Any]) -> int:
    """Ranks that the degrees in `flags` ask for."""
    degrees = [n for name, n in flags.items() if name.endswith("_degree")]
    degrees.append(2 if flags.get("use_cfg_parallel") else 1)
    return functools.reduce(lambda a, b: a * b, degrees)


def engine(flags: Mapping[str, Any]) -> EngineConfig:
    """The configuration of a session on a rank."""
    return xFuserArgs(**flags, allow_unproven=True).create_config()[0]


def arguments(pipeline: Any, **changes: Any) -> dict[str, Any]:
    """Keyword arguments of one guided call over `STEPS` steps, with `changes`."""
    changed = {"num_inference_steps": STEPS, **changes}
    known = (
        "height",
        "width",
        "batch_size",
        "guidance",
        "text",
        "seed",
        "num_inference_steps",
        "output_type",
    )
    made = call_kwargs(pipeline, **{k: v for k, v in changed.items() if k in known})
    if "use_resolution_binning" in made:
        made["use_resolution_binning"] = False
    return {**made, **{k: v for k, v in changed.items() if k not in known}}


def latents(output: Any) -> torch.Tensor:
    """The tensor in a pipeline's output."""
    held = output[0] if isinstance(output, tuple) else output.images
    assert isinstance(held, torch.Tensor)
    return held.clone()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2."""
    return relative_error([found], [expected])


def only(results: list[Any]) -> Any:
    """What the one rank returned that has an output."""
    (held,) = [result for result in results if result is not None]
    return held
