"""The passes of a denoising loop: one a step, or one a (step, patch).

Warm-up steps are synchronous: each pass works on whole latents.  The steps after them are
asynchronous (PipeFusion): each pass works on one patch, and the stages work on different
patches at the same time.  Three values travel between the first and the last stage:
whole latents after a synchronous step, a patch's rows after an asynchronous pass, and
whole latents to every stage at the end of a step when something besides the transformer
reads them there: a callback, another model, or code behind the loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch

from xfuser_runtime.distributed import parallel_state
from xfuser_runtime.distributed.collectives import P2PChannel, broadcast
from xfuser_runtime.distributed.runtime_state import RuntimeState

Latents = tuple[torch.Tensor, ...]
"""What a loop carries: most often one tensor."""
Share = Literal["steps", "loop"]
"""When every stage gets the whole latents: at the end of each step, or of the last one."""


class DenoisingLoop:
    """Drives the passes of one call of a pipeline.

    Args:
        items: what upstream's loop iterates over, one item a step.
        num_warmup_steps: synchronous steps before the asynchronous ones.
        state: runtime state of this rank.
        has_callback: a callback runs at the end of each step on whole latents.
        share: when else every stage gets the whole latents; None for never.
    """

    def __init__(
        self,
        items: list[Any],
        num_warmup_steps: int,
        state: RuntimeState,
        *,
        has_callback: bool,
        share: Share | None = None,
    ) -> None:
        self._items = items
        self._state = state
        self.has_callback = has_callback
        self._shares_steps = has_callback or share == "steps"
        self._shares_end = share is not None
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
        self._made: Latents = ()

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
        # What follows works on whole latents: schedulers join the copies of patches.
        self._state.start_pass(step=self._state.step, patch=None)

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
        on with what they hold.  Where steps are shared, all passes of a step start from the
        latents that it began with, on every stage.
        """
        state = self._state
        state.latents_shape = tuple(latents[0].shape)
        step, patch = state.step, state.patch
        state.first_latents = latents[0] if step == 0 else None
        if (
            self._channel is None
            or self._shares_steps
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
        state, is_over = self._state, self.step_is_complete
        self._committed[state.patch] = [each.dtype for each in after]
        latents = tuple(
            old.to(new.dtype) for old, new in zip(before, after, strict=True)
        )
        if self._is_last:
            made = self._taken_over(latents, after)
            latents = latents if self._shares_steps and not is_over else made
        if is_over and (self._shares_steps or self._shares_end and self._is_last_step):
            latents = tuple(map(self._shared, latents))
        return latents

    def _taken_over(self, before: Latents, after: Latents) -> Latents:
        """The last stage's whole latents with this pass's region new; the first is told."""
        region = self._state.latent_slice
        made = sent = after
        if region is not None:
            started = self._shares_steps and self._state.patch != 0
            sent = tuple(map(region.narrow, after))
            made = tuple(map(region.write, self._made if started else before, sent))
        if self._shares_steps:
            self._made = made
        elif not self._is_last_step:
            assert self._channel is not None
            for each in sent:
                self._channel.send(each.contiguous(), 0)
        return made

    def _shared(self, latents: torch.Tensor) -> torch.Tensor:
        """The last stage's latents, on every stage."""
        latents = latents.contiguous()
        if not self._is_last:
            latents = torch.empty_like(latents)
        return broadcast(latents, self._group, self._num_stages - 1)

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

    @property
    def _is_last_step(self) -> bool:
        return self._state.step == len(self._items) - 1
