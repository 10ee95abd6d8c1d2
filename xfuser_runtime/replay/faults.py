"""Faults that verification injects into the ranks of a run, to see that it catches them.

Each fault breaks one mechanism by replacing one function of the runtime, alike on all ranks, so
that nothing hangs: what should have arrived is lost, or is one row off.  They act only in the
forked ranks of a replay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from xfuser_runtime.attention import ring, ulysses
from xfuser_runtime.attention.cache import KVCache
from xfuser_runtime.distributed.parallel_state import Group, is_pipeline_last_stage
from xfuser_runtime.distributed.runtime_state import get_runtime_state
from xfuser_runtime.layers import attention, attention_site, conv, gathered
from xfuser_runtime.pipelines import cfg, data_parallel
from xfuser_runtime.pipelines.denoising_loop import DenoisingLoop
from xfuser_runtime.schedulers.step import StepCall
from xfuser_runtime.transformers import region
from xfuser_runtime.transformers.outputs import map_tensors
from xfuser_runtime.transformers.stages import StageLinks


class Fault:
    """One injected fault.

    Attributes:
        reached: True once the broken function was called.
    """

    def __init__(self) -> None:
        self.reached = False
        self._undo = contextlib.ExitStack()

    def replace(
        self, owner: Any, name: str, broken: Callable[[Callable[..., Any]], Any]
    ) -> None:
        """Replace `owner.name` by `broken(original)`."""
        original = getattr(owner, name)
        replacement = broken(original)

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.reached = True
            return replacement(*args, **kwargs)

        setattr(owner, name, noted)
        self._undo.callback(setattr, owner, name, original)

    def enter(self, context: contextlib.AbstractContextManager[Any]) -> None:
        """Keep a context open for as long as the fault acts."""
        self._undo.enter_context(context)

    def undo(self) -> None:
        """Put all functions back."""
        self._undo.close()


@contextlib.contextmanager
def injected(name: str) -> Iterator[Fault]:
    """The fault `name`, acting inside the block.

    Raises:
        ValueError: there is no such fault.
    """
    if name not in FAULTS:
        raise ValueError(f"fault {name!r}, expected one of {', '.join(FAULTS)}")
    fault = Fault()
    try:
        FAULTS[name](fault)
        yield fault
    finally:
        fault.undo()


def _own_rows_alone(original: Callable[..., Any]) -> Callable[..., Any]:
    """`all_gather` with zeros for the rows of other ranks."""

    def gather(
        x: torch.Tensor, dim: int, lengths: Sequence[int], group: Group
    ) -> torch.Tensor:
        pieces = []
        for rank, length in enumerate(lengths):
            shape = list(x.shape)
            shape[dim] = length
            mine = rank == group.rank_in_group
            pieces.append(x if mine else x.new_zeros(shape))
        return torch.cat(pieces, dim=dim)

    return gather


def _gather_dropped(fault: Fault) -> None:
    """After the blocks, the rows of other ranks are missing."""
    fault.replace(region, "all_gather", _own_rows_alone)


def _gathered_tokens_dropped(fault: Fault) -> None:
    """Modules that mix tokens see zeros for those of other ranks."""
    fault.replace(gathered, "all_gather", _own_rows_alone)


def _token_sum_dropped(fault: Fault) -> None:
    """Sums over tokens are those of this rank's tokens."""

    def broken(original: Callable[..., Any]) -> Callable[..., Any]:
        def reduce(x: torch.Tensor, group: Group) -> torch.Tensor:
            return x

        return reduce

    fault.replace(attention, "all_reduce_sum", broken)


def _absent_tokens_attend(fault: Fault) -> None:
    """Tokens that a mask leaves out take part."""

    def broken(original: Callable[..., Any]) -> Callable[..., Any]:
        def kept(present: torch.Tensor, rows: int) -> torch.Tensor:
            return torch.ones_like(original(present, rows))

        return kept

    fault.replace(attention, "kept_rows", broken)


def _halo_dropped(fault: Fault) -> None:
    """The rows that a convolution needs of other ranks are zeros."""

    def broken(original: Callable[..., Any]) -> Callable[..., Any]:
        def exchange(
            band: torch.Tensor, borders: Any, needs: Any, group: Group
        ) -> torch.Tensor:
            rows = original(band, borders, needs, group).clone()
            rank = group.rank_in_group
            above = max(0, borders[rank] - max(0, needs[rank][0]))
            rows[:, :, :above] = 0
            rows[:, :, above + band.shape[2] :] = 0
            return rows

        return exchange

    fault.replace(conv, "exchange_rows", broken)


def _ulysses_exchange_dropped(fault: Fault) -> None:
    """Nothing of what other ranks send in the all-to-all arrives."""

    def broken(original: Callable[..., Any]) -> Callable[..., Any]:
        def exchange(
            x: torch.Tensor, output_splits: Sequence[int], *args: Any
        ) -> torch.Tensor:
            received = original(x, output_splits, *args).clone()
            group: Group = args[-1]
            for rank, piece in enumerate(received.split(list(output_splits))):
                if rank != group.rank_in_group:
                    piece.zero_()
            return received

        return exchange

    fault.replace(ulysses, "all_to_all_flat", broken)


def _ring_exchange_dropped(fault: Fault) -> None:
    """The keys that go round are zeros."""

    def broken(original: Callable[..., Any]) -> Callable[..., Any]:
        def post(leaving: Any, arriving: Any, group: Group) -> list[Any]:
            for x in (arriving.key, arriving.value):
                x.zero_()
            if arriving.mask is not None:
                arriving.mask.fill_(arriving.mask.dtype == torch.bool)
            return []

        return post

    fault.replace(ring, "_post_transfer", broken)


def _position_rows_shifted(fault: Fault) -> None:
    """The tokens of a patch, or of all shards but the first, are one row off."""

    def broken(original: Callable[..., Any]) -> Callable[..., Any]:
        def cut(self: Any, value: torch.Tensor, dim: int, streams: Any) -> torch.Tensor:
            if self.patch is not None or self.shard_index > 0:
                value = value.roll(1, dims=dim)
            return original(self, value, dim, streams)

        return cut

    fault.replace(region.BlockRegion, "_cut", broken)


def _key_doubled(fault: Fault) -> None:
    """The first key of each rank counts twice and its second not at all."""

    def broken(original: Callable[..., Any]) -> Callable[..., Any]:
        def attend(query: Any, key: Any, value: Any, **kwargs: Any) -> Any:
            rows = torch.arange(key.shape[1], device=key.device)
            rows[1:2] = 0
            return original(query, key[:, rows], value[:, rows], **kwargs)

        return attend

    fault.replace(attention_site, "parallel_attention", broken)


def _mask_dropped(fault: Fault) -> None:
    """No attention call of the denoising loop has a mask."""

    def broken(original: Callable[..., Any]) -> Callable[..., Any]:
        def attend(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **{**kwargs, "attn_mask": None})

        return attend

    class WithoutMask(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            in_loop = func is F.scaled_dot_product_attention and _in_loop()
            if in_loop and kwargs.get("attn_mask") is not None:
                fault.reached = True
                kwargs = {**kwargs, "attn_mask": None}
            return func(*args, **kwargs)

    fault.replace(attention_site, "parallel_attention", broken)
    fault.enter(WithoutMask())


def _cfg_exchange_dropped(fault: Fault) -> None:
    """Each rank takes its own branch for both."""

    def broken(original: Callable[..., Any]) -> Callable[..., Any]:
        def gather(
            x: torch.Tensor, dim: int, lengths: Sequence[int], group: Group
        ) -> torch.Tensor:
            return torch.cat([x] * len(lengths), dim=dim)

        return gather

    fault.replace(cfg, "all_gather", broken)


def _cfg_helper_output_dropped(fault: Fault) -> None:
    """What a model makes for this rank's branch is zeros."""

    def broken(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            return map_tensors(torch.zeros_like, original(*args))

        return run

    fault.replace(cfg, "_of_branch", broken)


def _replica_rows_swapped(fault: Fault) -> None:
    """Every replica takes the rows of the next one."""

    def broken(original: Callable[..., Any]) -> Callable[..., Any]:
        def share(batch: int, images: int, replica: int, replicas: int) -> Any:
            return original(batch, images, (replica + 1) % replicas, replicas)

        return share

    fault.replace(data_parallel.Share, "of_replica", broken)


def _stage_hand_over_dropped(fault: Fault) -> None:
    """A stage goes on with its own placeholder instead of what it received."""

    def broken(original: Callable[..., Any]) -> Callable[..., Any]:
        def receive(self: Any, stream: Any) -> Any:
            original(self, stream)
            return stream

        return receive

    fault.replace(StageLinks, "_receive", broken)


def _stage_feedback_dropped(fault: Fault) -> None:
    """The first stage never sees what the last stage made of the latents."""

    def broken(original: Callable[..., Any]) -> Callable[..., Any]:
        def receive(self: Any, *latents: torch.Tensor) -> Any:
            original(self, *latents)
            return latents

        return receive

    fault.replace(DenoisingLoop, "receive", broken)


def _further_latents_dropped(fault: Fault) -> None:
    """Of several latents, the first stage sees what the last made of the first alone."""

    def broken(original: Callable[..., Any]) -> Callable[..., Any]:
        def receive(self: Any, *latents: torch.Tensor) -> Any:
            return original(self, *latents)[:1] + latents[1:]

        return receive

    fault.replace(DenoisingLoop, "receive", broken)


def _shared_latents_dropped(fault: Fault) -> None:
    """Stages that are not the last get zeros for the latents that all should get."""

    def broken(original: Callable[..., Any]) -> Callable[..., Any]:
        def shared(self: Any, latents: torch.Tensor) -> torch.Tensor:
            found = original(self, latents)
            return found if is_pipeline_last_stage() else torch.zeros_like(found)

        return shared

    fault.replace(DenoisingLoop, "_shared", broken)


def _stale_cache_frozen(fault: Fault) -> None:
    """Patch passes never write their keys into the cache."""

    def broken(original: Callable[..., Any]) -> Callable[..., Any]:
        def store(self: Any, block: Any, *, patch: int | None, **kwargs: Any) -> None:
            if patch is None or patch not in self.filled:
                original(self, block, patch=patch, **kwargs)

        return store

    fault.replace(KVCache, "store", broken)


def _scheduler_stepped_twice(fault: Fault) -> None:
    """The scheduler copy of patch 0 steps twice in the first asynchronous step."""
    done = False

    def broken(original: Callable[..., Any]) -> Callable[..., Any]:
        def step(self: Any, patch: int) -> Any:
            nonlocal done
            result = original(self, patch)
            if patch == 0 and not done:
                done = True
                index = getattr(self._scheduler, "_step_index", None)
                arguments = self._bound.arguments
                arguments["sample"] = result[0]
                result = original(self, patch)
                # Its index stays right: a copy that runs off the end would not be silent.
                if index is not None:
                    self._scheduler._step_index = index
            return result

        return step

    fault.replace(StepCall, "_run_patch", broken)


def _in_loop() -> bool:
    return get_runtime_state().step >= 0


FAULTS: dict[str, Callable[[Fault], None]] = {
    "gather_dropped": _gather_dropped,
    "gathered_tokens_dropped": _gathered_tokens_dropped,
    "token_sum_dropped": _token_sum_dropped,
    "halo_dropped": _halo_dropped,
    "absent_tokens_attend": _absent_tokens_attend,
    "ulysses_exchange_dropped": _ulysses_exchange_dropped,
    "ring_exchange_dropped": _ring_exchange_dropped,
    "position_rows_shifted": _position_rows_shifted,
    "key_doubled": _key_doubled,
    "mask_dropped": _mask_dropped,
    "cfg_exchange_dropped": _cfg_exchange_dropped,
    "cfg_helper_output_dropped": _cfg_helper_output_dropped,
    "replica_rows_swapped": _replica_rows_swapped,
    "stage_hand_over_dropped": _stage_hand_over_dropped,
    "stage_feedback_dropped": _stage_feedback_dropped,
    "further_latents_dropped": _further_latents_dropped,
    "shared_latents_dropped": _shared_latents_dropped,
    "stale_cache_frozen": _stale_cache_frozen,
    "scheduler_stepped_twice": _scheduler_stepped_twice,
}
