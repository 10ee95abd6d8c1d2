"""Whether the mask that a rank's attention call gets is one that the runtime can complete.

Shapes: masks broadcast to (B, H, Sq, Sk).
"""

from __future__ import annotations

import torch

from porter.analysis.mixing import TokenCut
from porter.probe.cuts import Shard, Unlike, same

OUTER_FORMS = {
    "and": lambda vector: vector[..., :, None] & vector[..., None, :],
    "product": lambda vector: vector[..., :, None] * vector[..., None, :],
}
"""How a mask over pairs may come from one vector over tokens."""


def mask_form(
    whole: torch.Tensor | None,
    local: torch.Tensor | None,
    *,
    queries: TokenCut,
    keys: TokenCut,
    all_keys: int,
    shard: Shard,
) -> str | None:
    """The outer product that makes the mask; None for masks that follow the arguments.

    Raises:
        Unlike: the rank's mask is none that the runtime knows.
    """
    if whole is None and local is None:
        return None
    if whole is None or local is None:
        raise Unlike
    whole, local = (m[(None,) * (4 - m.ndim)] for m in (whole, local))
    if local.shape[-1] == all_keys and whole.shape[-1] == all_keys:
        return None  # rows of a mask over pairs, which the region has cut
    alike = local.shape[-2] == 1 or local.stride(-2) == 0
    keys = TokenCut(3, keys.streams)
    if alike and same(shard.select(whole[..., :1, :], keys), local[..., :1, :]):
        return None
    columns = shard.select(whole, keys)
    if whole.shape[-2] != whole.shape[-1] or queries.streams != keys.streams:
        raise Unlike
    if not same(shard.select(columns, TokenCut(2, keys.streams)), local):
        raise Unlike
    vector = torch.diagonal(whole, dim1=-2, dim2=-1)
    name = "and" if whole.dtype == torch.bool else "product"
    if same(OUTER_FORMS[name](vector), whole):
        return name
    raise Unlike
