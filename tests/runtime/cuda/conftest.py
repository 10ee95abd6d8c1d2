"""What tests of rewritten blocks share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from xfuser_runtime.cuda import products


@pytest.fixture
def inference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Numbers that come again, no gradients, and tiny products that are large enough."""
    monkeypatch.setattr(products, "MIN_COLUMNS", 8)
    torch.manual_seed(0)
    with torch.no_grad():
        yield
