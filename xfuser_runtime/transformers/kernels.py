"""How the operations of a transformer call become kernels: compiled blocks, attention order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from xfuser_runtime.distributed.runtime_state import (
    get_runtime_state,
    runtime_state_is_initialized,
)
from xfuser_runtime.transformers.stages import EmptyBlock

# On Hopper cuDNN's attention is up to twice as fast as torch's flash kernel; a call that
# it does not take goes on to the next.
_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_HOPPER = (9, 0)


def compile_blocks(model: nn.Module, loops: Iterable[str]) -> None:
    """Compile this rank's blocks in place where the session asks for it.

    The blocks of a list share one compiled code; the code around them stays as it is.

    Args:
        model: a wrapped transformer.
        loops: attribute names of its block lists.
    """
    if not runtime_state_is_initialized():
        return
    if not get_runtime_state().runtime_config.use_torch_compile:
        return
    for name in loops:
        for block in getattr(model, name):
            if not isinstance(block, EmptyBlock):
                block.compile()


@contextlib.contextmanager
def preferred_kernels() -> Iterator[None]:
    """Within the block torch's own attention calls try the fastest kernel first.

    Nothing changes where the session names a kernel, on CPU, or on GPUs where the order has
    not been measured.
    """
    if torch.compiler.is_compiling() or not _is_measured_device():
        yield
        return
    if get_runtime_state().runtime_config.attention_backend is not None:
        yield
        return
    with sdpa_kernel(_ORDER, set_priority=True):
        yield


def _is_measured_device() -> bool:
    return (
        torch.cuda.is_available()
        and torch.cuda.is_initialized()
        and torch.cuda.get_device_capability() == _HOPPER
    )
