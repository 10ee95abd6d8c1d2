"""Attention over sharded tokens and patches: Ulysses, ring, both, and the K/V cache."""

from __future__ import annotations

from xfuser_runtime.attention.api import AttentionPlan, parallel_attention
from xfuser_runtime.attention.backends import backend_names, check_backend_name
from xfuser_runtime.attention.cache import KVCache
from xfuser_runtime.attention.keys import key_order

__all__ = [
    "AttentionPlan",
    "KVCache",
    "backend_names",
    "check_backend_name",
    "key_order",
    "parallel_attention",
]
