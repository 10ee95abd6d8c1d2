"""Rules for attention processors."""

from __future__ import annotations

from typing import Any

from porter.rules.attention.absolute_imports import AbsoluteImports
from porter.rules.attention.attention_call import AttentionCall
from porter.rules.attention.present_tokens import PresentTokens
from porter.rules.attention.softmax_scale import SoftmaxScale
from porter.rules.attention.token_sums import TokenSums
from porter.rules.attention.whole_masks import WholeMasks
from porter.rules.base import Rule

RULES: tuple[type[Rule[Any]], ...] = (
    AbsoluteImports,
    SoftmaxScale,
    PresentTokens,
    WholeMasks,
    AttentionCall,
    TokenSums,
)
