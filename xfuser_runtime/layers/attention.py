"""Attention modules on sharded tokens and patches (manual, section 4).

Any attention module is re-classed in place; its processor is exchanged for the ported one,
whose attention call comes back to the module. The module knows which token streams its rows
are and keeps the key/value caches of PipeFusion.

Shapes: B batch, S query rows, K key rows, H query heads, G key heads, D head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from torch import nn

from xfuser_runtime.attention.backends import from_diffusers_name
from xfuser_runtime.base_wrapper import swap_class
from xfuser_runtime.distributed.collectives import all_reduce_sum
from xfuser_runtime.distributed.parallel_state import get_ring_group, get_sp_group
from xfuser_runtime.distributed.runtime_state import (
    active_region,
    get_runtime_state,
    runtime_state_is_initialized,
)
from xfuser_runtime.errors import InputError
from xfuser_runtime.layers.attention_site import AttentionSite, attend, attend_at
from xfuser_runtime.layers.base import (
    derive,
    rebind_forward,
    xFuserLayerBaseWrapper,
)
from xfuser_runtime.layers.present_tokens import check_in_front, kept_rows
from xfuser_runtime.layers.processors import fit_processor
from xfuser_runtime.layers.register import xFuserLayerWrappersRegister

_SITE = "_xfuser_attention_site"


class xFuserAttentionBaseWrapper(xFuserLayerBaseWrapper):
    """An attention module whose attention calls see the keys of all ranks and patches."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Every way to set a processor ends in this assignment: `set_processor`,
        # `set_attn_processor`, loading of adapters, fusing of projections.
        if name == "processor":
            value = fit_processor(value)
        super().__setattr__(name, value)

    def scaled_dot_product_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *,
        present: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As torch's function of this name, over the keys of all ranks: (B, H, S, D).

        Outside of a block region it is torch's function. `present` is the mask of what
        `present_tokens` returned the indices of: tokens of queries and keys, the last ones.

        Raises:
            InputError: see `parallel_attention`; dropout is refused.
        """
        call = self._parallel_call(None)
        if call is None:
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=attn_mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        _refuse(query, dropout_p, None)
        if present is not None:
            attn_mask = kept_rows(present, key.shape[-2])[None, None, None]
        out = call(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
        out = out.transpose(1, 2)
        if present is not None:
            assert attn_mask is not None
            out = out.masked_fill(~attn_mask.transpose(-1, -2), 0)
        return out

    def present_tokens(self, mask: torch.Tensor) -> torch.Tensor:
        """Indices of the tokens that `mask` marks; of all of them where tokens are cut.

        The attention call that follows is then given the mask as `present`.

        Raises:
            InputError: on cut tokens, it marks one behind another that it leaves out.
        """
        if self._parallel_call(None) is None:
            return torch.nonzero(mask, as_tuple=False).flatten()
        region, site = active_region(), vars(self)[_SITE]
        assert region is not None
        # All modules of a region are given the same masks: the first looks at them.
        region.first_site = region.first_site or site
        if region.first_site is site:
            check_in_front(mask, region, region.expand(site.key_segments)[-1])
        return torch.arange(len(mask), device=mask.device)

    def dispatch_attention_fn(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: Mapping[str, Any] | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> torch.Tensor:
        """As diffusers' function of this name, over the keys of all ranks: (B, S, H, D).

        Outside of a block region it is diffusers' function. A mask (B, K) is a key mask.

        Raises:
            InputError: see `parallel_attention`; dropout, kernel options and diffusers'
                own context parallelism are refused, and its backends without a
                counterpart here.
        """
        call = self._parallel_call(backend, dispatched=True)
        if call is None:
            return attention_dispatch.dispatch_attention_fn(
                query,
                key,
                value,
                attn_mask=attn_mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
                attention_kwargs=attention_kwargs,
                backend=backend,
                parallel_config=parallel_config,
            )
        _refuse(query, dropout_p, attention_kwargs, parallel_config)
        if attn_mask is not None and attn_mask.shape == (len(query), key.shape[1]):
            attn_mask = attn_mask[:, None, None, :]
        return call(
            query,
            key,
            value,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )

    def sum_over_tokens(self, partial: torch.Tensor) -> torch.Tensor:
        """A sum over tokens from the sums of each rank's tokens, on every rank.

        Raises:
            InputError: a pass over one patch, whose sum lacks the other patches.
        """
        region = active_region()
        if region is None or region.whole:
            return partial
        if region.patch is not None:
            raise InputError(
                "a sum over the tokens of one patch, expected all of them; use "
                "warmup_steps >= the number of steps"
            )
        return all_reduce_sum(partial, get_sp_group())

    def count_all_tokens(self, held: int) -> int:
        """Query tokens of all ranks and patches, where this rank holds `held` of them.

        Raises:
            InputError: this rank holds another number.
        """
        region, site = active_region(), vars(self)[_SITE]
        if region is None or region.whole:
            return held
        names = region.expand(site.query_segments)
        mine = region.layout.length(names, region.patch, region.shard_index)
        if held != mine:
            raise InputError(
                f"{held} tokens in an attention module, expected {mine} of "
                f"{', '.join(names)}; the port does not fit this input: run porter verify"
            )
        return sum(region.layout.lengths(names, None))

    def _parallel_call(
        self, backend: Any, *, dispatched: bool = False
    ) -> Callable[..., torch.Tensor] | None:
        """`parallel_attention` for this call's rows, None where upstream's call is right."""
        if not runtime_state_is_initialized():
            return None
        state, site = get_runtime_state(), vars(self)[_SITE]
        region = state.region
        if region is None or not site.key_segments:
            return None
        name = state.runtime_config.attention_backend
        layout = region.layout
        if layout.num_shards == 1 and layout.num_patches == 1 and name is None:
            return None
        if name is None and dispatched:
            name = _diffusers_backend(backend)
        if torch.compiler.is_compiling() and (
            layout.num_patches > 1 or get_ring_group().world_size > 1
        ):
            return functools.partial(attend_at, site.number, name)
        return functools.partial(attend, site, region, name)


def wrap_attention(
    module: nn.Module,
    query_segments: Sequence[str],
    key_segments: Sequence[str],
    whole: Sequence[str] = (),
    outer_mask: str | None = None,
) -> nn.Module:
    """Make an attention module work on sharded tokens; returns the same object.

    Args:
        module: any module with a `processor`, or one whose class has a wrapper in
            `xFuserLayerWrappersRegister`.
        query_segments: the token streams of its query rows, in their order.
        key_segments: those of its keys; empty where the keys are whole on every rank.
        whole: those of its keys that every rank has whole, beside keys that are cut.
        outer_mask: how its mask is made of one vector over the tokens, see `MaskVector`.

    Raises:
        ValueError: the manual's message for a layer that is not ported, or a processor
            where tokens or blocks are split. The module is then unchanged.
    """
    segments = set(key_segments)
    site = AttentionSite(
        tuple(query_segments),
        tuple(key_segments),
        tuple(name for name in whole if name in segments),
        outer_mask,
    )
    original = type(module)
    if not issubclass(original, xFuserAttentionBaseWrapper):
        wrapper = xFuserLayerWrappersRegister.find(original)
        processor = getattr(module, "processor", None)
        if wrapper is None and processor is not None:
            wrapper = derive(xFuserAttentionBaseWrapper, original)
        elif wrapper is None or not issubclass(wrapper, xFuserAttentionBaseWrapper):
            # Its forward computes attention by itself, on this rank's keys alone.
            wrapper = xFuserLayerWrappersRegister.get_class(original)
        if processor is not None:
            processor = fit_processor(processor)
        swap_class(module, wrapper)
        rebind_forward(module, original)
        if processor is not None:
            module.processor = processor
    vars(module)[_SITE] = site
    return module


def reset_kv_caches(model: nn.Module) -> None:
    """Forget the cached keys and values of all attention modules of a model.

    Their memory is kept: the next call of the same shape finds it where captured calls know it.
    """
    for module in model.modules():
        site = vars(module).get(_SITE)
        if site is not None:
            site.caches.reset()
            site.mask_vectors.reset()


def _diffusers_backend(backend: Any) -> str | None:
    """Our name of the kernel that diffusers would use."""
    if backend is None:
        backend = attention_dispatch._AttentionBackendRegistry.get_active_backend()[0]
    return from_diffusers_name(str(getattr(backend, "value", backend)))


def _refuse(
    query: torch.Tensor,
    dropout_p: float,
    attention_kwargs: Mapping[str, Any] | None,
    parallel_config: Any = None,
) -> None:
    if query.ndim != 4:
        raise InputError(
            f"a query of shape {tuple(query.shape)} in a parallel attention call, "
            "expected 4 dimensions"
        )
    if dropout_p:
        raise InputError(
            f"dropout_p {dropout_p} in a parallel attention call, expected 0; "
            "call model.eval()"
        )
    if attention_kwargs:
        raise InputError(
            f"kernel options {sorted(attention_kwargs)} in a parallel attention call, "
            "expected none"
        )
    if parallel_config is not None:
        raise InputError(
            "diffusers' own context parallelism on a wrapped model, expected none; "
            "remove enable_parallelism()"
        )
