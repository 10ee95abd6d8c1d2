"""A denoising loop for scheduler tests: on whole latents, or patch by patch.

The model works element by element, so that stepping patches must give the bits of the
whole step.  In a patch pass, its output outside of the patch is rubbish: a step that looks
there cannot come out right.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from xfuser_runtime.config import EngineConfig
from xfuser_runtime.distributed.runtime_state import (
    LatentSlice,
    RuntimeState,
    destroy_runtime_state,
    initialize_runtime_state,
)

#: Uneven borders along 8 rows, by number of patches.
BORDERS = {2: (0, 3, 8), 3: (0, 1, 5, 8), 4: (0, 1, 2, 5, 8)}

#: Rows of (B, C, H, W), packed tokens (B, S, C), frames of (B, C, F, H, W).
SHAPES = {2: ((2, 4, 8, 6), (1, 3, 8, 2, 3)), 1: ((2, 8, 5),)}
SHAPES_AND_DIMS = [(shape, dim) for dim, shapes in SHAPES.items() for shape in shapes]


@contextmanager
def session() -> Iterator[RuntimeState]:
    """A runtime state for one process."""
    try:
        yield initialize_runtime_state(EngineConfig())
    finally:
        destroy_runtime_state()


@dataclass
class Run:
    """What a denoising loop gave."""

    latents: torch.Tensor
    others: list[torch.Tensor] = field(default_factory=list)
    random_state: torch.Tensor | None = None


def model(sample: torch.Tensor, step: int) -> torch.Tensor:
    """Stands for a transformer: differs by element, works element by element."""
    weight = torch.linspace(0.3, 1.1, sample.numel()).reshape(sample.shape)
    return torch.sin(weight * sample + 0.7 * step) + 0.1 * sample


def first_latents(shape: tuple[int, ...], seed: int = 3) -> torch.Tensor:
    """Random latents; the global random state stays as it is."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generators(kind: str, batch: int) -> Any:
    """What users pass as `generator`: nothing, one, or one a sample."""
    if kind == "none":
        return None
    if kind == "one":
        return torch.Generator().manual_seed(11)
    return [torch.Generator().manual_seed(11 + index) for index in range(batch)]


def step_kwargs(scheduler: Any, generator: Any, **given: Any) -> dict[str, Any]:
    """`given` and the generator where `step` takes one, as diffusers' pipelines do it."""
    if (
        generator is not None
        and "generator" in inspect.signature(scheduler.step).parameters
    ):
        given["generator"] = generator
    return given


def denoise(
    scheduler: Any,
    shape: tuple[int, ...],
    *,
    steps: int = 6,
    kind: str = "none",
    seed: int = 5,
    state: RuntimeState | None = None,
    warmup: int = 0,
    borders: tuple[int, ...] = (),
    dim: int = 2,
    unused_timesteps: int = 0,
    return_dict: bool = False,
    begin: Callable[
        [Any, int], None
    ] = lambda scheduler, steps: scheduler.set_timesteps(steps),
    call: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> Run:
    """Denoise from the same start; patch by patch after `warmup` steps, given a `state`."""
    torch.manual_seed(seed)
    latents = first_latents(shape)
    generator = generators(kind, shape[0])
    begin(scheduler, steps)
    kwargs = step_kwargs(scheduler, generator, **kwargs)
    call = call or (
        lambda scheduler, output, t, sample, **kw: scheduler.step(
            output, t, sample, return_dict=return_dict, **kw
        )
    )
    run = Run(latents)
    patches = len(borders) - 1
    if state is not None:
        state.num_patches = patches
        state.latents_shape = shape
    timesteps = scheduler.timesteps[: len(scheduler.timesteps) - unused_timesteps]
    for step, t in enumerate(timesteps):
        for patch in [None] if state is None or step < warmup else range(patches):
            if state is not None:
                state.start_pass(step=step, patch=patch)
                if patch is not None:
                    state.latent_slice = LatentSlice(
                        dim, borders[patch], borders[patch + 1]
                    )
            # Flow-matching schedulers have no input to scale.
            scale = getattr(scheduler, "scale_model_input", lambda sample, t: sample)
            output = model(scale(run.latents, t), step)
            if patch is not None:
                rubbish = first_latents(shape, seed=100 + step) * 50
                rows = state.latent_slice
                output = rows.write(rubbish, rows.narrow(output))
            result = call(scheduler, output, t, run.latents, **kwargs)
            new = [
                value for value in _values(result) if isinstance(value, torch.Tensor)
            ]
            if patch is None:
                run.latents = new[0]
            else:
                # The pipeline commits the rows of the pass, and may do so in place.
                run.latents = rows.write(
                    run.latents.to(new[0].dtype), rows.narrow(new[0])
                )
            run.others = new[1:]
    if state is not None:
        state.end_passes()
    used = generator[0] if isinstance(generator, list) else generator
    run.random_state = torch.cat(
        [torch.get_rng_state(), *([used.get_state()] if used else [])]
    )
    return run


def differences(first: Run, second: Run) -> list[str]:
    """What is not bit-equal in two runs."""
    found = []
    if not torch.equal(first.latents, second.latents):
        found.append("latents")
    if len(first.others) != len(second.others) or not all(
        torch.equal(a, b) for a, b in zip(first.others, second.others, strict=False)
    ):
        found.append("other outputs")
    if not torch.equal(first.random_state, second.random_state):
        found.append("random state")
    if not torch.isfinite(first.latents).all():
        found.append("latents that are not finite")
    return found


def _values(result: Any) -> list[Any]:
    return list(result.values()) if hasattr(result, "values") else list(result)
