"""Whole transformer calls as CUDA graphs: launched once instead of kernel by kernel.

At 1024 pixels a step on a fast GPU is bound by the launches of its kernels. A call whose
shapes have been seen before is captured, collectives included, and replayed from then on; it
composes with compiled blocks. The first call of a shape runs as it is: it loads kernels,
makes communicators and compiles. So does the second one, in which it is noted what the host sends
to the device and reads from it (`xfuser_runtime.cuda.host`). The arguments are copied into tensors
that keep their address, the output is cloned, so that callers notice nothing.

Messages between stages stay outside: the call is cut into graphs where they stand, so a fast
stage waits for a slow one in no graph. A pass over a patch is captured once it leaves what it
keeps for others where it found it.

What cannot be captured runs as before, and the log says once why.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xfuser_runtime.cuda.arguments import (
    NotReplayable,
    copied,
    describe,
    state_of,
    tensors_of,
)
from xfuser_runtime.cuda.host import HostRecorder, played
from xfuser_runtime.cuda.kept import KeptState, call_sites
from xfuser_runtime.cuda.notes import HostNotes
from xfuser_runtime.cuda.recorder import GraphPool, GraphRecorder
from xfuser_runtime.cuda.snapshot import ModelSnapshot
from xfuser_runtime.distributed import parallel_state
from xfuser_runtime.distributed.collectives import P2PChannel
from xfuser_runtime.distributed.runtime_state import get_runtime_state
from xfuser_runtime.layers.base import CallSites
from xfuser_runtime.transformers.outputs import map_tensors

logger = logging.getLogger(__name__)

#: Calls of each patch that a transformer keeps graphs of; the one unused for longest goes first.
MAX_GRAPHS = 8
#: Captures that may become stale before the calls are left alone.
MAX_STALE = 4
#: Graphs for calls of one signature whose host sends or reads other numbers (with guidance and
#: without); one that goes counts as stale where it answered fewer calls than it is worth.
MAX_VARIANTS, WORTH_CAPTURING = 4, 2

Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]


@dataclass(frozen=True)
class TransformerCall:
    """`function(model, *args, **kwargs)`, and what its arguments hold."""

    function: Callable[..., Any]
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def arguments(self) -> Any:
        """All of them, nested."""
        return self.args, self.kwargs

    @functools.cached_property
    def tensors(self) -> list[torch.Tensor]:
        """Those among the arguments, in order."""
        return tensors_of(self.arguments)

    @functools.cached_property
    def device_type(self) -> str:
        """Where it computes: no more than one device besides the host."""
        types = {tensor.device.type for tensor in self.tensors}
        return max(types - {"cpu"}, default="cpu")

    def run(self) -> Any:
        """Its result."""
        return self.function(self.model, *self.args, **self.kwargs)


@dataclass
class CapturedCall:
    """A captured call.

    Args:
        inputs: the tensors that the graphs read, one for each of the arguments.
        output: nested output whose tensors the graphs write.
        replay: runs the graphs on the current stream.
        notes: what the host sends and reads meanwhile.
        addresses: of the tensors that passes keep for each other.
        count: calls that it has answered.
    """

    inputs: list[torch.Tensor]
    output: Any
    replay: Callable[[], None]
    notes: HostNotes
    addresses: tuple[int, ...] = ()
    count: int = 0

    def __call__(self, arguments: Sequence[torch.Tensor]) -> Any:
        """The output for the tensors of other arguments of the same signature."""
        self.count += 1
        for static, given in zip(self.inputs, arguments, strict=True):
            static.copy_(given)
        self.replay()
        return map_tensors(torch.clone, self.output)


class CallReplayer:
    """Runs the calls of one transformer, from a graph where there is one.

    Args:
        capture: captures a function without arguments; None for CUDA graphs.
        channel: to and from the neighbouring stages, where there are any.
        streams: whole streams that patches fill.

    Attributes:
        reasons: why calls were not captured, in the order in which the reasons came up.
        capture_seconds: time that captures took.
        replays: calls that were answered by a graph.
    """

    def __init__(
        self,
        capture: Capture | None = None,
        *,
        channel: P2PChannel | None = None,
        streams: Mapping[Any, Any] | None = None,
    ) -> None:
        self.reasons: list[str] = []
        self.capture_seconds = 0.0
        self.replays = 0
        self._capture = capture
        self._channel = channel
        # The one that is filled later, though it is empty now.
        self._streams = {} if streams is None else streams
        self._pool: GraphPool | None = None
        self._stream: torch.cuda.Stream | None = None
        # A call seen once has nothing yet, one seen twice has notes, and then a graph.
        self._calls: OrderedDict[Hashable, list[CapturedCall | HostNotes]] = (
            OrderedDict()
        )
        self._snapshot: ModelSnapshot | None = None
        self._sites: list[CallSites[Any]] = []
        self._num_stale = 0
        self._has_given_up = False

    def call(
        self,
        function: Callable[..., Any],
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """`function(model, *args, **kwargs)`."""
        call = TransformerCall(function, model, args, kwargs)
        if not self._is_wanted():
            return call.run()
        try:
            if self._snapshot is not None and not self._snapshot.holds():
                self._forget()
            kept = self._kept(model)
            key = (*self._key(call), kept.form)
            held = self._variant(key, call)
            if held is None and key in self._calls:
                return self._noted(call, kept, key)
            captured = held
            if isinstance(held, CapturedCall) and held.addresses != kept.addresses:
                captured = held.notes
            if isinstance(captured, HostNotes):
                captured = self._captured(call, kept, captured)
        except NotReplayable as error:
            self._tell(str(error))
            self._has_given_up = error.is_final
            return call.run()
        if captured is None:
            output, is_repeatable = self._run(call, kept)
            if is_repeatable:
                self._keep(key)
            return output
        self._keep(key, captured, in_place_of=held)
        self.replays += 1
        return captured(call.tensors)

    def _variant(
        self, key: Hashable, call: TransformerCall
    ) -> CapturedCall | HostNotes | None:
        """What is held of a call in which the host sends and reads the same numbers."""
        for held in self._calls.get(key, ()):
            notes = held.notes if isinstance(held, CapturedCall) else held
            if notes.hold(call.tensors):
                return held
        return None

    def _noted(self, call: TransformerCall, kept: KeptState, key: Hashable) -> Any:
        """The call as it is; with its notes the next one can be captured."""
        with HostRecorder(call.tensors, call.device_type) as recorder:
            output, is_repeatable = self._run(call, kept)
        if recorder.notes.reason is not None:
            self._tell(recorder.notes.reason)
            self._has_given_up = True
        elif is_repeatable:
            self._keep(key, recorder.notes)
        return output

    def _run(self, call: TransformerCall, kept: KeptState) -> tuple[Any, bool]:
        """The call as it is; whether it left alone what others go on with."""
        state = state_of(call.arguments)
        output = call.run()
        is_kept = self._kept(call.model) == kept
        return output, is_kept and state_of(call.arguments) == state

    def clear(self) -> None:
        """Drop all graphs and the memory that they hold."""
        self._calls.clear()
        self._snapshot = self._pool = None

    def _is_wanted(self) -> bool:
        """False where a graph is not asked for, which needs no explanation."""
        state = get_runtime_state()
        if torch.compiler.is_compiling() or parallel_state.is_dry_run():
            return False
        if not state.runtime_config.use_cuda_graph or self._has_given_up:
            return False
        if state.num_patches > 1 and (state.patch is None or state.step == 0):
            # It begins what the passes over patches go on with.
            return False
        return self._capture is not None or not torch.cuda.is_current_stream_capturing()

    def _key(self, call: TransformerCall) -> tuple[Hashable, ...]:
        """All that a graph is fixed to; calls of a pass never share one.

        Raises:
            NotReplayable: the pass or the arguments change what a graph cannot.
        """
        state = get_runtime_state()
        if torch.is_grad_enabled():
            raise NotReplayable("gradients are enabled")
        description = tuple(describe(call.arguments))
        devices = {x.device for x in call.tensors if x.device.type != "cpu"}
        if len(devices) > 1:
            raise NotReplayable(
                f"arguments on {', '.join(sorted(map(str, devices)))}, a graph reads one device"
            )
        call_index = state.call_index if state.step >= 0 else 0
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype(
            "cuda"
        )
        return (
            (call_index, state.patch, state.num_patches),
            (state.latents_shape, *state.loop_shapes.items()),
            autocast,
            description,
        )

    def _kept(self, model: nn.Module) -> KeptState:
        """What the passes over patches keep for each other; nothing without patches."""
        if get_runtime_state().num_patches == 1:
            return KeptState()
        # Of a model that is watched for changes the layers need not be gone through again.
        if self._snapshot is None:
            self._sites = list(call_sites(model))
        return KeptState.of(self._sites, self._streams)

    def _captured(
        self, call: TransformerCall, kept: KeptState, notes: HostNotes
    ) -> CapturedCall:
        """Capture the call; nothing is computed yet.

        Raises:
            NotReplayable: a hook stands in the way, or the call does what no graph holds.
        """
        _check_hooks(call.model)
        start = time.perf_counter()
        inputs = copied(call.arguments, torch.clone)
        capture = self._capture or self._capture_on_device

        def run() -> Any:
            # The call may take its lists apart, and the tensors in them are written to later.
            own_args, own_kwargs = copied(inputs)
            with played(notes, call.device_type):
                return call.function(call.model, *own_args, **own_kwargs)

        try:
            replay, output = capture(run)
        except Exception as error:
            reason = f"the capture failed: {_first_line(error)}"
            raise NotReplayable(reason, is_final=True) from error
        if self._kept(call.model) != kept:
            reason = "passes over patches change what they keep otherwise"
            raise NotReplayable(reason, is_final=True)
        self.capture_seconds += time.perf_counter() - start
        if self._snapshot is None:
            self._snapshot = ModelSnapshot(call.model)
        return CapturedCall(tensors_of(inputs), output, replay, notes, kept.addresses)

    def _capture_on_device(
        self, function: Callable[[], Any]
    ) -> tuple[Callable[[], None], Any]:
        if self._pool is None:
            # One pool for all: outputs are cloned, so graphs may write over each other. Memory
            # goes from one to the next on the same stream alone.
            self._pool = GraphPool()
            self._stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        recorder = GraphRecorder(self._pool)
        with torch.cuda.stream(self._stream), recorder, self._recording(recorder):
            output = function()
        return recorder.replay, output

    @contextlib.contextmanager
    def _recording(self, recorder: GraphRecorder) -> Iterator[None]:
        """Within the block messages between stages become steps of a recorder."""
        if self._channel is None:
            yield
            return
        self._channel.recorder = recorder.put_between
        try:
            yield
        finally:
            self._channel.recorder = None

    def _keep(
        self,
        key: Hashable,
        variant: CapturedCall | HostNotes | None = None,
        in_place_of: CapturedCall | HostNotes | None = None,
    ) -> None:
        variants = self._calls.setdefault(key, [])
        self._calls.move_to_end(key)
        if variant is not None:
            # The one unused for longest goes first.
            kept = [x for x in variants if x is not in_place_of and x is not variant]
            variants[:] = [*kept, variant]
        if len(variants) > MAX_VARIANTS:
            oldest = variants.pop(0)
            if isinstance(oldest, HostNotes) or oldest.count < WORTH_CAPTURING:
                self._count_stale(
                    "the host sends or reads numbers that change from call to call"
                )
        while len(self._calls) > MAX_GRAPHS * get_runtime_state().num_patches:
            self._calls.popitem(last=False)

    def _forget(self) -> None:
        """The model is not what it was at the capture."""
        self.clear()
        self._count_stale("weights, adapters or settings change from call to call")

    def _count_stale(self, reason: str) -> None:
        self._num_stale += 1
        if self._num_stale > MAX_STALE:
            self._tell(reason)
            self._has_given_up = True

    def _tell(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)
            logger.warning("transformer calls run without a CUDA graph: %s", reason)


def _check_hooks(model: nn.Module) -> None:
    """Refuse code between the layers that must run at every call (offload, caches)."""
    for name, module in model.named_modules():
        if module is model:
            continue
        held = vars(module)
        hooked = held["_forward_hooks"] or held["_forward_pre_hooks"]
        if hooked or "_hf_hook" in held or "_diffusers_hook" in held:
            raise NotReplayable(f"a hook on {name}")


def _first_line(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text.splitlines()[0]
