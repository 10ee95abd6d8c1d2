"""Whole transformer calls as CUDA graphs: launched once instead of kernel by kernel.

At 1024 pixels a step on a fast GPU is bound by the launches of its kernels. A call whose
shapes have been seen before is captured, collectives included, and replayed from then on; it
composes with compiled blocks. The first call of a shape runs as it is: it loads kernels,
makes communicators and compiles. The arguments are copied into tensors that keep their
address, the output is cloned, so that callers notice nothing.

What cannot be captured runs as before, and the log says once why.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xfuser_runtime.distributed import parallel_state
from xfuser_runtime.distributed.runtime_state import get_runtime_state
from xfuser_runtime.transformers.outputs import map_tensors, tensors_in
from xfuser_runtime.transformers.snapshot import ModelSnapshot

logger = logging.getLogger(__name__)

#: Graphs that a transformer keeps; the one unused for longest goes first.
MAX_GRAPHS = 8
#: Captures that may become stale before the calls are left alone.
MAX_STALE = 4

_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device)

Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]


class NotReplayable(Exception):
    """A call that no graph can stand for; the message says why."""


@dataclass
class CapturedCall:
    """A captured call.

    Args:
        inputs: nested arguments whose tensors the graph reads.
        output: nested output whose tensors the graph writes.
        replay: runs the graph on the current stream.
    """

    inputs: Any
    output: Any
    replay: Callable[[], None]

    def __call__(self, arguments: Any) -> Any:
        """The output for other arguments of the same signature."""
        for static, given in zip(
            tensors_in(self.inputs), tensors_in(arguments), strict=True
        ):
            static.copy_(given)
        self.replay()
        return map_tensors(torch.clone, self.output)


class CallReplayer:
    """Runs the calls of one transformer, from a graph where there is one.

    Args:
        capture: captures a function without arguments; None for CUDA graphs.

    Attributes:
        reasons: why calls were not captured, in the order in which the reasons came up.
        capture_seconds: time that captures took.
        replays: calls that were answered by a graph.
    """

    def __init__(self, capture: Capture | None = None) -> None:
        self.reasons: list[str] = []
        self.capture_seconds = 0.0
        self.replays = 0
        self._capture = capture
        self._pool: Any = None
        self._calls: OrderedDict[Hashable, CapturedCall | None] = OrderedDict()
        self._snapshot: ModelSnapshot | None = None
        self._num_stale = 0

    def call(
        self,
        function: Callable[..., Any],
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """`function(model, *args, **kwargs)`."""
        if not self._is_wanted((args, kwargs)):
            return function(model, *args, **kwargs)
        try:
            key = self._key(args, kwargs)
            if self._snapshot is not None and not self._snapshot.holds():
                self._forget()
            captured = self._calls.get(key)
            if captured is None and key in self._calls:
                captured = self._captured(function, model, args, kwargs)
        except NotReplayable as error:
            self._tell(str(error))
            return function(model, *args, **kwargs)
        self._keep(key, captured)
        if captured is None:
            return function(model, *args, **kwargs)
        self.replays += 1
        return captured((args, kwargs))

    def clear(self) -> None:
        """Drop all graphs and the memory that they hold."""
        self._calls.clear()
        self._snapshot = self._pool = None

    def __deepcopy__(self, memo: dict[int, Any]) -> CallReplayer:
        # A copied transformer has weights of its own.
        return CallReplayer(self._capture)

    def _is_wanted(self, arguments: Any) -> bool:
        """False where a graph is not asked for, which needs no explanation."""
        state = get_runtime_state()
        if torch.compiler.is_compiling() or parallel_state.is_dry_run():
            return False
        if not state.runtime_config.use_cuda_graph or self._num_stale > MAX_STALE:
            return False
        if self._capture is not None:
            return True
        tensors = tensors_in(arguments)
        return (
            any(x.is_cuda for x in tensors)
            and not torch.cuda.is_current_stream_capturing()
        )

    def _key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        """All that a graph is fixed to; calls of a pass never share one.

        Raises:
            NotReplayable: the pass or the arguments change what a graph cannot.
        """
        state = get_runtime_state()
        if parallel_state.get_pipeline_parallel_world_size() > 1:
            raise NotReplayable("stages wait for each other in the host")
        if state.patch is not None or state.num_patches > 1:
            raise NotReplayable("the pass keeps keys and values for others")
        if torch.is_grad_enabled():
            raise NotReplayable("gradients are enabled")
        devices = {x.device for x in tensors_in((args, kwargs))}
        if len(devices) > 1:
            raise NotReplayable(
                f"arguments on {', '.join(sorted(map(str, devices)))}, a graph reads one device"
            )
        call_index = state.call_index if state.step >= 0 else 0
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype(
            "cuda"
        )
        return (call_index, autocast, tuple(_describe((args, kwargs))))

    def _captured(
        self,
        function: Callable[..., Any],
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> CapturedCall:
        """Capture the call; nothing is computed yet.

        Raises:
            NotReplayable: a hook stands in the way, or the call does what no graph holds.
        """
        _check_hooks(model)
        start = time.perf_counter()
        inputs = map_tensors(torch.clone, (args, kwargs))
        run = self._capture or self._capture_on_device
        try:
            replay, output = run(lambda: function(model, *inputs[0], **inputs[1]))
        except Exception as error:
            self._num_stale = MAX_STALE + 1
            raise NotReplayable(f"the capture failed: {_first_line(error)}") from error
        self.capture_seconds += time.perf_counter() - start
        if self._snapshot is None:
            self._snapshot = ModelSnapshot(model)
        return CapturedCall(inputs, output, replay)

    def _capture_on_device(
        self, function: Callable[[], Any]
    ) -> tuple[Callable[[], None], Any]:
        if self._pool is None:
            # One pool for all: outputs are cloned, so graphs may write over each other.
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog) go on calling CUDA during the capture.
        with torch.cuda.graph(
            graph, pool=self._pool, capture_error_mode="thread_local"
        ):
            output = function()
        return graph.replay, output

    def _keep(self, key: Hashable, captured: CapturedCall | None) -> None:
        self._calls[key] = captured
        self._calls.move_to_end(key)
        while len(self._calls) > MAX_GRAPHS:
            self._calls.popitem(last=False)

    def _forget(self) -> None:
        """The model is not what it was at the capture."""
        self._num_stale += 1
        self.clear()
        if self._num_stale > MAX_STALE:
            self._tell("weights, adapters or settings change from call to call")

    def _tell(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)
            logger.warning("transformer calls run without a CUDA graph: %s", reason)


def _describe(value: Any) -> Iterator[Hashable]:
    """Structure, shapes and constants of nested arguments.

    Raises:
        NotReplayable: a value that is neither a tensor nor a constant.
    """
    if isinstance(value, torch.Tensor):
        yield (tuple(value.shape), value.dtype, value.device)
    elif isinstance(value, _CONSTANTS):
        yield (type(value), value)
    elif isinstance(value, dict):
        yield tuple(value)
        for item in value.values():
            yield from _describe(item)
    elif isinstance(value, (tuple, list)):
        yield (type(value), len(value))
        for item in value:
            yield from _describe(item)
    else:
        raise NotReplayable(f"an argument of type {type(value).__name__}")


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
