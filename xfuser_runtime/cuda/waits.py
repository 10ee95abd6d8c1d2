"""Notice where the host waits for the device."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

#: What torch says where the host waits.
WAIT = "called a synchronizing CUDA operation"


@contextlib.contextmanager
def waits_noticed() -> Iterator[list[warnings.WarningMessage]]:
    """Within the block: a list that gets a warning each time that the host waits for the device."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with sync_debug_mode("warn"):
            yield found
    for other in found:
        if "Synchronization debug mode" not in str(other.message):
            warnings.warn_explicit(
                other.message, other.category, other.filename, other.lineno
            )


@contextlib.contextmanager
def sync_debug_mode(mode: str) -> Iterator[None]:
    """Within the block: what torch does where the host waits, `default` or `warn`."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode(mode)
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
