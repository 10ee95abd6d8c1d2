"""A session of the runtime on one test rank, and what the attention tests measure."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from tests.runtime.layers.modules import (
    WIDTH,
    MixinAttention,
)
from xfuser_runtime.config import EngineConfig, ParallelConfig, RuntimeConfig
from xfuser_runtime.distributed.layout import Segment, TokenLayout
from xfuser_runtime.distributed.parallel_state import (
    get_sp_group,
    initialize_model_parallel,
)
from xfuser_runtime.distributed.runtime_state import (
    RuntimeState,
    initialize_runtime_state,
)

GATE, CAUGHT = 5e-6, 30.0
TOKENS = 11


def start(ulysses: int = 1, ring: int = 1, backend: str | None = None) -> RuntimeState:
    config = ParallelConfig(ulysses_degree=ulysses, ring_degree=ring)
    if ulysses * ring > 1:
        initialize_model_parallel(config)
    return initialize_runtime_state(
        EngineConfig(
            parallel_config=config,
            runtime_config=RuntimeConfig(attention_backend=backend),
        )
    )


def enter(
    state: RuntimeState, patches: int = 1, patch: int | None = None, call: int = 0
) -> TokenLayout:
    """Enter a block region as the transformer wrapper does, with a fresh region object."""
    layout = TokenLayout(
        (Segment("image", TOKENS, follows_latents=True),),
        patches,
        get_sp_group().world_size,
    )
    state.call_index = call
    state.region = SimpleNamespace(
        layout=layout, patch=patch, call_index=call, expand=tuple
    )
    return layout


def tokens(seed: int = 0, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, TOKENS, WIDTH, generator=generator)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm())


def mixin_attention() -> MixinAttention:
    torch.manual_seed(1)
    return MixinAttention().eval()
