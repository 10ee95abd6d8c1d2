"""The attention kernels themselves, each as (out, lse); `backends` says what each can take.

Shapes: B batch, S query rows, K key rows, H query heads, G key heads (H a multiple of G),
D head dimension. Tensors are (B, S, H, D); masks are (B or 1, H or 1, S or 1, K), bool (True
takes part) or additive in the data type of the query.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Result = tuple[torch.Tensor, torch.Tensor | None]

#: In each version of flash-attn.
_FLASH = "flash_attn_func"


@dataclass(frozen=True)
class KernelCall:
    """One attention over all its keys.

    Args:
        query: (B, S, H, D).
        key: (B, K, G, D).
        value: (B, K, G, Dv).
        mask: (B or 1, H or 1, S or 1, K), bool or additive, None for none.
        is_causal: row i takes keys 0 to i.
        scale: factor of the scores, None for D ** -0.5.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None = None
    is_causal: bool = False
    scale: float | None = None

    @property
    def softmax_scale(self) -> float:
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a key head."""
        return self.query.shape[2] != self.key.shape[2]

    def heads_first(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value as views of shape (B, H, S, D)."""
        query, key, value = (
            x.transpose(1, 2) for x in (self.query, self.key, self.value)
        )
        return query, key, value

    def heads_first_repeated(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `heads_first`, key heads repeated to the number of query heads."""
        query, key, value = self.heads_first()
        if self.grouped:
            times = self.query.shape[2] // self.key.shape[2]
            key = key.repeat_interleave(times, dim=1)
            value = value.repeat_interleave(times, dim=1)
        return query, key, value

    def additive_mask(self) -> torch.Tensor | None:
        """The mask in its additive form."""
        if self.mask is None or self.mask.dtype != torch.bool:
            return self.mask
        zeros = torch.zeros((), dtype=self.query.dtype, device=self.query.device)
        return torch.where(self.mask, zeros, float("-inf"))


Kernel = Callable[[KernelCall, bool], Result]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


@torch.compiler.assume_constant_result
def is_importable(package: str) -> bool:
    """Whether a package is installed; it is not imported, its parents are."""
    return _is_importable(package)


@functools.cache
def _is_importable(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


def empty(call: KernelCall) -> Result:
    """What attention over no keys (or of no rows) is: zeros, log-sum-exp -inf."""
    query = call.query
    out = query.new_zeros((*query.shape[:-1], call.value.shape[-1]))
    lse = torch.full(
        (query.shape[0], query.shape[2], query.shape[1]),
        float("-inf"),
        dtype=accumulation_dtype(query.dtype),
        device=query.device,
    )
    return out, lse


def clear_masked_rows(
    call: KernelCall, out: torch.Tensor, lse: torch.Tensor | None
) -> Result:
    """Give rows whose keys are all masked the output 0 and the log-sum-exp -inf.

    Kernels disagree about such rows (torch's CPU kernel says 0 for the log-sum-exp, others
    NaN or +inf), and one such block would spoil a merge.
    """
    mask = call.mask
    if mask is None or lse is None:
        return out, lse
    kept = mask if mask.dtype == torch.bool else mask != float("-inf")
    dead = ~kept.any(dim=-1)  # (B or 1, H or 1, S or 1)
    out = out.masked_fill(dead.transpose(1, 2).unsqueeze(-1), 0)
    return out, lse.masked_fill(dead, float("-inf"))


def sdpa(call: KernelCall, need_lse: bool) -> Result:
    """torch's own choice; no log-sum-exp."""
    query, key, value = call.heads_first()
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=call.mask,
        is_causal=call.is_causal,
        scale=call.scale,
        enable_gqa=call.grouped,
    )
    return out.transpose(1, 2), None


def math(call: KernelCall, need_lse: bool) -> Result:
    """Plain tensor operations, scores in fp32 (fp64 for fp64)."""
    dtype = accumulation_dtype(call.query.dtype)
    query, key, value = (x.to(dtype) for x in call.heads_first_repeated())
    scores = (query * call.softmax_scale) @ key.mT
    mask = call.additive_mask()
    if mask is not None:
        scores = scores + mask
    if call.is_causal:
        rows, columns = scores.shape[-2:]
        later = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).triu_(
            1
        )
        scores = scores.masked_fill(later, float("-inf"))
    lse = scores.logsumexp(dim=-1)
    # A row without any key has lse -inf; 0 in its place keeps exp(-inf - lse) at 0.
    shift = lse.masked_fill(lse == float("-inf"), 0)
    out = (scores - shift.unsqueeze(-1)).exp() @ value
    return out.to(call.query.dtype).transpose(1, 2), lse


def cpu_flash(call: KernelCall, need_lse: bool) -> Result:
    """torch's blocked kernel for CPU."""
    query, key, value = call.heads_first_repeated()
    mask = call.additive_mask()
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query,
        key,
        value,
        is_causal=call.is_causal,
        attn_mask=None if mask is None else mask.expand(*_scores_shape(call)),
        scale=call.scale,
    )
    return out.transpose(1, 2), lse


def cuda_flash(call: KernelCall, need_lse: bool) -> Result:
    """torch's flash attention on CUDA; no mask."""
    query, key, value = call.heads_first_repeated()
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, is_causal=call.is_causal, scale=call.scale
    )[:2]
    return out.transpose(1, 2), lse


def cuda_cudnn(call: KernelCall, need_lse: bool) -> Result:
    """cuDNN's attention through torch."""
    query, key, value = call.heads_first_repeated()
    mask = _bounded(call.additive_mask())
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query,
        key,
        value,
        None if mask is None else mask.expand(*_scores_shape(call)),
        need_lse,
        is_causal=call.is_causal,
        scale=call.scale,
    )[:2]
    return out.transpose(1, 2), (
        lse.reshape(_scores_shape(call)[:-1]) if need_lse else None
    )


def cuda_efficient(call: KernelCall, need_lse: bool) -> Result:
    """torch's memory-efficient attention on CUDA."""
    query, key, value = call.heads_first_repeated()
    mask = _bounded(call.additive_mask())
    if mask is not None:
        mask = _aligned(mask).expand(*_scores_shape(call))
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, need_lse, is_causal=call.is_causal, scale=call.scale
    )[:2]
    # The kernel pads the rows of its log-sum-exp.
    return out.transpose(1, 2), lse[..., : query.shape[2]] if need_lse else None


def flash_2(call: KernelCall, need_lse: bool) -> Result:
    """The flash-attn package, version 2."""
    out, lse, _ = _flash("flash_attn", call, return_attn_probs=True)
    return out, lse


def flash_3(call: KernelCall, need_lse: bool) -> Result:
    """The flash-attn package, version 3 (Hopper)."""
    package, options = "flash_attn_interface", {}
    # Early releases return the log-sum-exp always, later ones when asked.
    if "return_attn_probs" in _function(package, _FLASH).__code__.co_varnames:
        options["return_attn_probs"] = need_lse
    found = _flash(package, call, **options)
    return (found[0], found[1]) if isinstance(found, tuple) else (found, None)


def flash_4(call: KernelCall, need_lse: bool) -> Result:
    """The flash-attn-4 package, whose kernels are made at the first call of a head dimension."""
    out, lse = _flash("flash_attn.cute", call, return_lse=need_lse)
    return out, lse


def sage(call: KernelCall, need_lse: bool) -> Result:
    """SageAttention, quantised: used only when named."""
    found = _function("sageattention", "sageattn")(
        call.query,
        call.key,
        call.value,
        tensor_layout="NHD",
        is_causal=call.is_causal,
        sm_scale=call.scale,
        return_lse=need_lse,
    )
    return found if need_lse else (found, None)


def _scores_shape(call: KernelCall) -> tuple[int, int, int, int]:
    batch, rows, heads, _ = call.query.shape
    return batch, heads, rows, call.key.shape[1]


def _bounded(mask: torch.Tensor | None) -> torch.Tensor | None:
    """An additive mask whose finite entries stay finite in kernels that scale by log2(e).

    Models mask with the smallest number of the type too. A row that is masked so in all keys
    of one block has a log-sum-exp of about that number, and must not come out as one without
    keys, of which kernels say what they like.
    """
    if mask is None:
        return None
    smallest = torch.finfo(mask.dtype).min / 2
    return torch.where(mask.isinf(), mask, mask.clamp(min=smallest))


def _aligned(mask: torch.Tensor) -> torch.Tensor:
    """The mask with rows that start at multiples of 16 elements, as the kernel reads them."""
    columns = mask.shape[-1]
    padded = F.pad(mask, (0, -columns % 16))
    return padded[..., :columns]


def _flash(package: str, call: KernelCall, **options: bool) -> Any:
    """What the function that all versions of flash-attn have returns."""
    return _function(package, _FLASH)(
        call.query,
        call.key,
        call.value,
        softmax_scale=call.scale,
        causal=call.is_causal,
        **options,
    )


def _function(package: str, name: str) -> Any:
    return getattr(importlib.import_module(package), name)
