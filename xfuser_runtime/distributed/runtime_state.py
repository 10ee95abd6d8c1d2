"""What this session runs with, and the pass of the denoising loop that it is in.

The configuration is frozen. The pass (step, patch, transformer call) is set by the pipeline before
each pass; the transformer, attention and scheduler wrappers only read it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from xfuser_runtime.config import (
    EngineConfig,
    InputConfig,
    ParallelConfig,
    RuntimeConfig,
)
from xfuser_runtime.distributed import parallel_state
from xfuser_runtime.distributed.layout import TokenLayout
from xfuser_runtime.errors import InputError, StateError


class BlockRegion(Protocol):
    """What attention and layers read of the block loop that is running."""

    layout: TokenLayout
    patch: int | None
    call_index: int


@dataclass(frozen=True)
class LatentSlice:
    """This pass's region of the latents: ``start`` to ``stop`` along ``dim``."""

    dim: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Extent along ``dim``."""
        return self.stop - self.start

    def narrow(self, whole: torch.Tensor) -> torch.Tensor:
        """The region of a whole tensor, a view."""
        return whole.narrow(self.dim, self.start, self.length)

    def write(self, whole: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """A copy of ``whole`` with ``rows`` in the region."""
        result = whole.clone()
        self.narrow(result).copy_(rows)
        return result


class RuntimeState:
    """Configuration and pass of this rank.

    Attributes:
        engine_config: of the session.
        input_config: of the pipeline call, see ``set_input_parameters``.
        loop_is_upstreams: a port runs whose loop is as upstream wrote it: its transformer calls
            are sharded wherever they stand, and the scheduler's steps part its passes.
        step: index of the denoising step, -1 outside the loop.
        patch: patch of this pass, None for a whole pass.
        num_patches: patches that this call's layouts are cut into.
        num_steps: denoising steps asked for.
        call_index: transformer call of this pass, -1 before the first.
        latents_shape: of the whole latents, None outside the loop.
        first_latents: the whole latents in the loop's first step, None later.
        loop_shapes: by the shape of a transformer's latents, that of the loop's in them.
        region: the block loop that is running, None outside.
        latent_slice: this pass's region of the latents, None for a whole pass.
        cfg_batch_is_split: the doubled batch holds this rank's guidance branch only.
        cfg_helpers_are_split: what other models made for the next transformer call is of
            this rank's branch only.
        cfg_branches_are_split: this rank makes only one of two sequential guidance calls.
        cfg_entry_is_skipped: another rank computes the guider's entry whose turn it is.
        has_symmetric_memory: the ranks of the Ulysses group can write to each other's memory.
        workspaces: such memory, by use, size and type.
    """

    def __init__(self, engine_config: EngineConfig) -> None:
        self.engine_config = engine_config
        self.input_config = InputConfig()
        self.region: BlockRegion | None = None
        self.latent_slice: LatentSlice | None = None
        self.has_symmetric_memory = False
        self.workspaces: dict[Any, Any] = {}
        self.end_passes()

    @property
    def parallel_config(self) -> ParallelConfig:
        """Degrees."""
        return self.engine_config.parallel_config

    @property
    def runtime_config(self) -> RuntimeConfig:
        """Warm-up steps, patches, backends."""
        return self.engine_config.runtime_config

    @property
    def num_steps(self) -> int:
        """Denoising steps that the call asked for."""
        return self.input_config.num_inference_steps

    @property
    def dry_run(self) -> bool:
        """True while shapes are worked out: each rank counts as first and last stage."""
        return parallel_state.is_dry_run()

    @dry_run.setter
    def dry_run(self, value: bool) -> None:
        parallel_state.set_dry_run(value)

    def set_input_parameters(self, **parameters: Any) -> None:
        """Take over what the pipeline call knows of its input (manual, 1.1 step 1).

        Args:
            parameters: fields of ``InputConfig`` (height, width, batch_size, num_inference_steps,
                num_frames, ...). None leaves a field as it is.

        Raises:
            InputError: ``InputConfig`` has no such field, or a value is out of range.
        """
        unknown = sorted(set(parameters) - set(InputConfig.__dataclass_fields__))
        if unknown:
            raise InputError(
                f"input parameter {unknown[0]!r}, expected one of"
                f" {', '.join(InputConfig.__dataclass_fields__)}"
            )
        given = {name: value for name, value in parameters.items() if value is not None}
        self.input_config = replace(self.input_config, **given)

    def start_pass(self, *, step: int, patch: int | None) -> None:
        """Begin a pass over ``patch`` of ``step``, None for a whole pass."""
        self._pass_is_over = False
        self.step = step
        self.patch = patch
        self.call_index = -1
        self.region = None
        self.latent_slice = self._slice_of(patch)

    def scheduler_stepped(self) -> None:
        """In a loop that is upstream's, the next transformer call begins a pass."""
        self._pass_is_over = self.loop_is_upstreams

    def enter_transformer_call(self) -> None:
        """Count a transformer call: caches of the pass are kept by call."""
        if self._pass_is_over:
            self.start_pass(step=self.step + 1, patch=None)
        self.call_index += 1
        self.region = None

    def begin_upstreams_loop(self) -> None:
        """A port runs whose loop is upstream's, until ``end_passes``."""
        self.loop_is_upstreams = self._pass_is_over = True

    def end_passes(self) -> None:
        """Forget the loop; what a call left behind must not reach the next."""
        self.loop_is_upstreams = False
        self.cfg_batch_is_split = False
        self.cfg_helpers_are_split = False
        self.cfg_branches_are_split = False
        self.cfg_entry_is_skipped = False
        self.begin_loop()

    def begin_loop(self) -> None:
        """Forget the passes: a loop begins, whose latents may have another shape."""
        self.num_patches = 1
        self.latents_shape: tuple[int, ...] | None = None
        self.first_latents: torch.Tensor | None = None
        self.loop_shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._row_borders: tuple[int, ...] | None = None
        self._patch_dim, self._patch_extent = 0, 0
        self.start_pass(step=-1, patch=None)

    @property
    def needs_patch_borders(self) -> bool:
        """True in a loop with patches while no region has set their borders."""
        return self.num_patches > 1 and self._row_borders is None

    @property
    def patch_dim(self) -> int:
        """Dimension of the latents whose slices are the patches; known from the first region on."""
        return self._patch_dim

    def adopt_patch_borders(self, layout: TokenLayout, dim: int, extent: int) -> None:
        """Take the patches' region of the latents from this call's first region.

        Args:
            layout: of a region.
            dim: dimension of the transformer's latents whose slices are the patches.
            extent: of that dimension there; the loop's latents must have the same.

        Raises:
            ValueError: the regions have different numbers of latent rows.
            InputError: the latents are not those that the transformer was given.
        """
        if not any(segment.follows_latents for segment in layout.segments):
            return
        borders = layout.patch_borders()
        if self._row_borders is None:
            self._row_borders = borders
            self._patch_dim, self._patch_extent = dim, extent
            self.latent_slice = self._slice_of(self.patch)
        elif borders != self._row_borders:
            raise ValueError(
                f"a region of {borders[-1]} latent rows after one of"
                f" {self._row_borders[-1]}, expected the same latents in all"
            )

    def _slice_of(self, patch: int | None) -> LatentSlice | None:
        """Region of the latents that ``patch`` covers; None where the borders are not known yet."""
        if patch is None or self._row_borders is None or self.latents_shape is None:
            return None
        rows, dim = self._row_borders[-1], self._patch_dim
        extent = self._patch_extent
        if len(self.latents_shape) <= dim or self.latents_shape[dim] != extent:
            raise InputError(
                f"latents of shape {self.latents_shape}, expected {extent} along dimension {dim} as in"
                " the transformer's; use warmup_steps >= the number of steps"
            )
        size = extent // rows
        return LatentSlice(
            dim, self._row_borders[patch] * size, self._row_borders[patch + 1] * size
        )


_RUNTIME_STATE: RuntimeState | None = None


def initialize_runtime_state(engine_config: EngineConfig) -> RuntimeState:
    """Start a session with ``engine_config``; replaces the one before."""
    global _RUNTIME_STATE
    _RUNTIME_STATE = RuntimeState(engine_config)
    return _RUNTIME_STATE


def runtime_state_is_initialized() -> bool:
    """True between ``initialize_runtime_state`` and ``destroy_runtime_state``."""
    return _RUNTIME_STATE is not None


def get_runtime_state() -> RuntimeState:
    """The session of this process.

    Raises:
        StateError: there is none.
    """
    if _RUNTIME_STATE is None:
        raise StateError(
            "no runtime state, expected one; wrap a pipeline or call initialize_runtime_state first"
        )
    return _RUNTIME_STATE


def active_region() -> BlockRegion | None:
    """The block loop that is running, None outside and without a session."""
    return None if _RUNTIME_STATE is None else _RUNTIME_STATE.region


def destroy_runtime_state() -> None:
    """End the session."""
    global _RUNTIME_STATE
    _RUNTIME_STATE = None
