"""Random weights that no mechanism can hide behind.

Models as their classes initialise them are dull: gates, last projections and
scale-shift tables are zero or one, so a model ignores its text and half of its
attention, and a wrong port passes every comparison.  Here every parameter gets noise of
a size that keeps the variance of the activations.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import nn

TABLE_STD = 0.5
"""Standard deviation of gates, scale-shift tables and other bare parameters."""

NORM_STD = 0.2
"""Spread of a norm's weight around its first value, and of a bias around zero."""

ATTENTION_GAIN = 1.5
"""Query and key projections: scores of variance 5 make attention choose, not average."""


def enliven(module: nn.Module, seed: int) -> None:
    """Fill every parameter of ``module`` in place with lively noise.

    Linear and convolution weights keep the variance of their input (fan-in scaling),
    norms stay near one, tables and gates get a spread of :data:`TABLE_STD`.  The draw
    of a parameter depends on ``seed`` and on its name alone, so that models that share
    names share weights.
    """
    owners = dict(module.named_modules())
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            generator = torch.Generator().manual_seed(
                (zlib.crc32(name.encode()) + 7919 * seed) % 2**31
            )
            noise = torch.randn(parameter.shape, generator=generator)
            prefix, _, leaf = name.rpartition(".")
            scaled = _scaled(noise, owners[prefix], prefix, leaf)
            if _is_norm(owners[prefix], prefix) and leaf != "bias" and noise.ndim == 1:
                # Around what the class draws: one, or zero where it adds the one itself.
                scaled += parameter.float().mean().round()
            parameter.copy_(scaled)


def _scaled(
    noise: torch.Tensor, owner: nn.Module, path: str, leaf: str
) -> torch.Tensor:
    """Bring unit noise to the size that the parameter's role asks for."""
    if leaf == "bias" or (_is_norm(owner, path) and noise.ndim == 1):
        return NORM_STD * noise
    if isinstance(owner, nn.Embedding):
        return noise
    if isinstance(owner, nn.Linear | nn.modules.conv._ConvNd):
        gain = ATTENTION_GAIN if _is_query_or_key(path) else 1.0
        return gain * noise / math.sqrt(max(noise[0].numel(), 1))
    if noise.ndim >= 3:  # stacked matrices, as experts keep them
        return noise / math.sqrt(max(noise.shape[-2:]))
    if noise.ndim == 2 and "weight" in leaf:
        return noise / math.sqrt(noise.shape[1])
    return TABLE_STD * noise


def _is_norm(owner: nn.Module, path: str) -> bool:
    last = path.rpartition(".")[2].lower()
    return "norm" in type(owner).__name__.lower() or "norm" in last


def _is_query_or_key(path: str) -> bool:
    last = path.rpartition(".")[2]
    return last in ("to_q", "to_k", "add_q_proj", "add_k_proj", "q_proj", "k_proj")
