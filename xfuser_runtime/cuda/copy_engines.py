"""Copies of rows that copy engines make: no multiprocessor takes part.

torch has kernels copy whatever is not one run of memory; the CUDA runtime's `cudaMemcpy2DAsync`
gives rows at a pitch to the engines as well.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

#: `cudaMemcpyDefault`: the addresses tell the devices.
_BY_ADDRESS = 4


def copy_rows(target: torch.Tensor, source: torch.Tensor) -> bool:
    """`target.copy_(source)` on the current stream; False where engines cannot make it.

    Args:
        target, source: (B, S, ...), what follows S dense in both, of one type, on CUDA.

    Raises:
        RuntimeError: the CUDA runtime refuses the copy.
    """
    copy_2d = _copy_2d() if target.is_cuda else None
    if copy_2d is None or not (_has_dense_rows(target) and _has_dense_rows(source)):
        return False
    stream = torch.cuda.current_stream(source.device).cuda_stream
    for to, out in zip(target, source, strict=True):
        width = out[0].numel() * out.itemsize if len(out) else 0
        if not width:
            continue
        error = copy_2d(
            to.data_ptr(),
            to.stride(0) * to.itemsize,
            out.data_ptr(),
            out.stride(0) * out.itemsize,
            width,
            len(out),
            _BY_ADDRESS,
            stream,
        )
        if error:
            raise RuntimeError(f"cudaMemcpy2DAsync failed with error {error}")
    return True


@functools.cache
def _copy_2d() -> Any:
    """The runtime's function; None where its library is not loaded under the usual name."""
    major = (torch.version.cuda or "").split(".")[0]
    try:
        function = ctypes.CDLL(f"libcudart.so.{major}").cudaMemcpy2DAsync
    except (OSError, AttributeError):
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    function.argtypes = [
        pointer,
        size,
        pointer,
        size,
        size,
        size,
        ctypes.c_int,
        pointer,
    ]
    function.restype = ctypes.c_int
    return function


def _has_dense_rows(x: torch.Tensor) -> bool:
    """What follows the second dimension is one run of memory, and rows do not overlap."""
    expected = 1
    for size, stride in zip(
        reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True
    ):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return x.stride(1) >= expected
