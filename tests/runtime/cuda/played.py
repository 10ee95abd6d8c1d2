"""Captures as they are played on CPU: a replay runs the function again, a capture computes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from xfuser_runtime.cuda.graphs import CallReplayer
from xfuser_runtime.transformers.outputs import tensors_in
from xfuser_runtime.transformers.wrapping import Wrapping


def played(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """As a CUDA graph: `replay` computes from the inputs' memory into the output's."""
    output = function()
    tensors = tensors_in(output)
    for tensor in tensors:
        tensor.fill_(float("nan"))  # a capture computes nothing

    def replay() -> None:
        for target, found in zip(tensors, tensors_in(function()), strict=True):
            target.copy_(found)

    return replay, output


class _NoReads(TorchDispatchMode):
    """As a capture on CUDA: an operation that the host waits for fails."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        return func(*args, **(kwargs or {}))


def played_without_reads(
    function: Callable[[], Any],
) -> tuple[Callable[[], None], Any]:
    """`played`, of a function that does not wait for numbers."""

    def run() -> Any:
        with _NoReads():
            return function()

    return played(run)


def run_call(
    forward: Callable[..., Any], model: Any, wrapping: Wrapping, args: Any, kwargs: Any
) -> Any:
    """In the place of the runtime's function of this name: played captures of stages on CPU."""
    if wrapping.replayer is None:
        channel = wrapping.channel()

        def capture(function: Callable[[], Any]) -> Any:
            """Messages of the capture are not sent, those of a replay are."""
            # What is told to it goes nowhere: the replay makes it anew.
            channel.recorder = lambda step: None

            def run() -> Any:
                try:
                    return function()
                finally:
                    channel.recorder = None

            return played(run)

        wrapping.replayer = CallReplayer(capture, streams=wrapping.buffers)
    return wrapping.replayer.call(forward, model, args, kwargs)
