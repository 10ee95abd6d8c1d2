"""What tests of rewritten blocks share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from xfuser_runtime.config import EngineConfig
from xfuser_runtime.cuda import products
from xfuser_runtime.distributed.runtime_state import (
    RuntimeState,
    destroy_runtime_state,
    initialize_runtime_state,
)


@pytest.fixture
def inference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Numbers that come again, no gradients, and tiny products that are large enough."""
    monkeypatch.setattr(products, "MIN_COLUMNS", 8)
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def state() -> Iterator[RuntimeState]:
    """The state of a session of one rank."""
    yield initialize_runtime_state(EngineConfig(world_size=1))
    destroy_runtime_state()
