"""The passes of a denoising loop: one a step, or one a (step, patch).

Warm-up steps are synchronous: each pass works on whole latents.  The steps after them are
asynchronous (PipeFusion): each pass works on one patch, and the stages work on different
patches at the same time.  Three values travel between the first and the last stage:
whole latents after a synchronous step, a patch's rows after an asynchronous pass, and
whole latents to every stage at the end of a step when a callback wants to see them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from xfuser_runtime.distributed import parallel_state
from xfuser_runtime.distributed.collectives import P2PChannel, broadcast
from xfuser_runtime.distributed.runtime_state import RuntimeState

Latents = tuple[torch.Tensor, ...]
"""What a loop carries: most often one tensor."""


class DenoisingLoop:
    """Drives the passes of one call of a pipeline.

    Args:
        items: what upstream's loop iterates over, one item a step.
        num_warmup_steps: synchronous steps before the asynchronous ones.
        state: runtime state of this rank.
        has_callback: a callback runs at the end of each step on whole latents.
    """

    def __init__(
        self,
        items: list[Any],
        num_warmup_steps: int,
        state: RuntimeState,
        *,
        has_callback: bool,
    ) -> None:
        self._items = items
        self._state = state
        self.has_callback = has_callback
        self._group = parallel_state.get_pp_group()
        self._num_stages = self._group.world_size
        patches = state.runtime_config.num_pipeline_patch
        # A patch that is the whole image is never displaced.
        self.sync_only = 1 in (self._num_stages, patches) or num_warmup_steps >= len(
            items
        )
        self._num_sync = len(items) if self.sync_only else num_warmup_steps
        self._num_patches = 1 if self.sync_only else patches
        self._channel = (
            P2PChannel(self._group, feedback=True) if self._num_stages > 1 else None
        )
        self._next_is_whole = False
        self._committed: dict[int | None, list[torch.dtype]] = {}

    def sync_steps(self) -> Iterator[Any]:
        """Whole passes over the warm-up steps, over all steps when `sync_only`."""
        self._state.num_patches = self._num_patches
        for step in range(self._num_sync):
            self._next_is_whole = False
            self._state.start_pass(step=step, patch=None)
            yield self._items[step]

    def async_steps(self) -> Iterator[Any]:
        """One pass a patch for each step after the warm-up; see `run_whole_step`."""
        for step in range(self._num_sync, len(self._items)):
            patches: Iterable[int | None] = range(self._num_patches)
            if self._next_is_whole:
                patches, self._next_is_whole = (None,), False
            for patch in patches:
                self._state.start_pass(step=step, patch=patch)
                yield self._items[step]

    def run_whole_step(self) -> None:
        """Make the next step one whole pass, which fills the K/V caches anew.

        For a callback that changes the batch of the transformer's input: what patches keep
        of the step before has another shape. Every stage holds whole latents then.
        """
        assert self.has_callback, "only a callback changes a call while it runs"
        self._next_is_whole = True

    @property
    def step_is_complete(self) -> bool:
        """True in the last pass of a step."""
        patch = self._state.patch
        return patch is None or patch == self._num_patches - 1

    def receive(self, *latents: torch.Tensor) -> Latents:
        """The latents that this pass starts from.

        The first stage takes what the last stage committed one step ago; other stages go
        on with what they hold.
        """
        state = self._state
        state.latents_shape = tuple(latents[0].shape)
        step, patch = state.step, state.patch
        state.first_latents = latents[0] if step == 0 else None
        if (
            self._channel is None
            or self.has_callback
            or step == 0
            or not self._is_first
        ):
            return latents
        if patch is None or (step == self._num_sync and patch == 0):
            return self._receive_like(latents, self._committed[None])
        if step == self._num_sync:
            return latents
        region = state.latent_slice
        assert region is not None
        held = [region.narrow(each) for each in latents]
        rows = self._receive_like(held, self._committed[patch])
        return tuple(map(region.write, latents, rows))

    def _receive_like(
        self, like: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]
    ) -> Latents:
        """What the last stage sent of a pass, of the types that this stage committed too."""
        assert self._channel is not None
        received = []
        for each, dtype in zip(like, dtypes, strict=True):
            buffer = torch.empty_like(
                each, dtype=dtype, memory_format=torch.contiguous_format
            )
            source = self._num_stages - 1
            received.append(self._channel.recv(buffer, source).to(each.dtype))
        return tuple(received)

    def commit(self, before: Latents, after: Latents) -> Latents:
        """What the body made of the latents, taken over for this pass's region only.

        The latents get the data types that the body gave them, on every stage.

        Args:
            before: whole latents at the start of the pass.
            after: whole latents as the body left them (after a blend, say).
        """
        if self._channel is None:
            return after
        self._committed[self._state.patch] = [each.dtype for each in after]
        return tuple(
            self._committed_one(old.to(new.dtype), new)
            for old, new in zip(before, after, strict=True)
        )

    def _committed_one(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        assert self._channel is not None
        region, latents = self._state.latent_slice, before
        if self._is_last:
            if region is None:
                latents = sent = after
            else:
                sent = region.narrow(after)
                latents = region.write(latents, sent)
            if not self.has_callback and self._state.step < len(self._items) - 1:
                self._channel.send(sent.contiguous(), 0)
        if self.has_callback and self.step_is_complete:
            latents = latents.contiguous()
            if not self._is_last:
                latents = torch.empty_like(latents)
            broadcast(latents, self._group, self._num_stages - 1)
        return latents

    def finish_sends(self) -> None:
        """Wait until the first stage has what this one sent it."""
        if self._channel is not None:
            self._channel.wait()

    @property
    def _is_first(self) -> bool:
        return self._group.rank_in_group == 0

    @property
    def _is_last(self) -> bool:
        return self._group.rank_in_group == self._num_stages - 1
