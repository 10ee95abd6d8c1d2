"""What a wrapped transformer keeps beside its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from xfuser_runtime.distributed import parallel_state
from xfuser_runtime.distributed.collectives import P2PChannel
from xfuser_runtime.transformers.outputs import Template
from xfuser_runtime.transformers.stages import StagePlan

if TYPE_CHECKING:
    from xfuser_runtime.cuda.graphs import CallReplayer


class Wrapping:
    """The stages of a transformer, and what its calls leave for later ones.

    A copied transformer keeps the stages and begins with nothing else.

    Args:
        plan: which stage runs which blocks.

    Attributes:
        templates: shapes of outputs, by the shapes of the arguments.
        template: of the call that runs.
        latent_shape, loop_shape: of the call's latents, and of the loop's in them.
        padding: tokens that the first stream with context after the latents has there.
        buffers: by call and block list, the streams that patches fill.
        replayer: of CUDA graphs, from the first call on a GPU on.
    """

    def __init__(self, plan: StagePlan) -> None:
        self.plan = plan
        self.templates: dict[Any, Template] = {}
        self.template: Template | None = None
        self.latent_shape: tuple[int, ...] = ()
        self.loop_shape: tuple[int, ...] = ()
        self.padding = 0
        self.buffers: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
        self.replayer: CallReplayer | None = None
        self._channel: P2PChannel | None = None

    def channel(self) -> P2PChannel:
        """To and from the neighbouring stages; made on first use."""
        if self._channel is None:
            self._channel = P2PChannel(parallel_state.get_pp_group())
        return self._channel

    def __deepcopy__(self, memo: dict[int, Any]) -> Wrapping:
        return Wrapping(self.plan)
