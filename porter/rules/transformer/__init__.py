"""Rules for a transformer's `forward`, in the manual's order."""

from __future__ import annotations

from typing import Any

from porter.rules.base import Rule
from porter.rules.transformer.block_guard import BlockGuard
from porter.rules.transformer.block_region import BlockRegion
from porter.rules.transformer.first_stage_pos_embed import FirstStagePosEmbed
from porter.rules.transformer.forward_check_condition import ForwardCheckCondition
from porter.rules.transformer.gathered_modules import GatheredModules
from porter.rules.transformer.init_submodules import InitSubmodules
from porter.rules.transformer.last_stage_output import LastStageOutput
from porter.rules.transformer.late_gather import LateGather
from porter.rules.transformer.patch_height_width import PatchHeightWidth

RULES: tuple[type[Rule[Any]], ...] = (
    GatheredModules,
    InitSubmodules,
    ForwardCheckCondition,
    PatchHeightWidth,
    FirstStagePosEmbed,
    BlockRegion,
    LateGather,
    BlockGuard,
    LastStageOutput,
)

#: Of a transformer that every rank runs whole: the call is counted and checked.
WHOLE_RULES: tuple[type[Rule[Any]], ...] = (ForwardCheckCondition,)
