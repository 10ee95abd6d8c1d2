"""Which of two attention kernels is to compute a shape on this GPU, timed at its first call.

No rule foretells it: one kernel cuts rows into other tiles than the other, which fill the
multiprocessors or do not, by the numbers of rows, heads and channels.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import replace

import torch

from xfuser_runtime.attention.backends import AttentionBackend
from xfuser_runtime.attention.kernels import KernelCall
from xfuser_runtime.cuda.timing import agrees, seconds_in_graph
from xfuser_runtime.distributed.runtime_state import (
    get_runtime_state,
    runtime_state_is_initialized,
)

logger = logging.getLogger(__name__)

#: With fewer keys a call is over before the tiles matter.
MIN_KEYS = 512
#: Share of the other's time. Results are rounded otherwise than those of the kernel that stock
#: diffusers takes: not for less than what the timing may be off by.
WORTH_IT = 0.95


def is_faster(
    backend: AttentionBackend, other: AttentionBackend, call: KernelCall
) -> bool:
    """Whether `backend` computes calls of this shape faster than `other`, and the same.

    The session keeps what it found. While a graph is captured nothing can be timed, and what is
    not known by then is no.

    Args:
        backend: may fail, as what a package compiles can.
        other: what it must be faster than.
        call: of the shape, without a mask; its numbers are not read.
    """
    if call.key.shape[1] < MIN_KEYS or not runtime_state_is_initialized():
        return False
    held = get_runtime_state().workspaces
    shapes = (call.query.shape, call.key.shape, call.query.dtype, call.query.device)
    key = ("attention", backend.name, *shapes, call.is_causal)
    if key not in held:
        if torch.cuda.is_current_stream_capturing():
            return False
        held[key] = _is_faster(backend, other, call)
    found: bool = held[key]
    return found


def _is_faster(
    backend: AttentionBackend, other: AttentionBackend, call: KernelCall
) -> bool:
    call = _alike(call)
    query, key = call.query, call.key
    told = f"{tuple(query.shape)} by {key.shape[1]} keys"
    try:
        right, found = (x.kernel(call, False)[0] for x in (other, backend))
        if not agrees(found, right):
            logger.warning("%s gives another result for %s", backend.name, told)
            return False
        slow, fast = (
            seconds_in_graph(functools.partial(x.kernel, call, False))
            for x in (other, backend)
        )
    # Whatever a package raises, there is another kernel.
    except Exception as error:
        logger.warning("%s cannot compute %s: %s", backend.name, told, error)
        return False
    logger.info(
        "attention of %s: %s %.0f us, %s %.0f us",
        *(told, other.name, slow * 1e6, backend.name, fast * 1e6),
    )
    return fast < WORTH_IT * slow


def _alike(call: KernelCall) -> KernelCall:
    """A call of the same shape with numbers of its own, which draws none that others draw."""
    device = call.query.device
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
        for x in (call.query, call.key, call.value)
    )
    return replace(call, query=query, key=key, value=value)
