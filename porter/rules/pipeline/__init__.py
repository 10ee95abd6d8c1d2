"""Rules for `__call__` of a pipeline, in the manual's order."""

from __future__ import annotations

from typing import Any

from porter.rules.base import Rule
from porter.rules.pipeline.call_decorators import CallDecorators
from porter.rules.pipeline.cfg_batched_call import CfgBatchedCall
from porter.rules.pipeline.cfg_branch_calls import CfgBranchCalls
from porter.rules.pipeline.cfg_guider_entries import CfgGuiderEntries
from porter.rules.pipeline.cfg_helper_call import CfgHelperCall
from porter.rules.pipeline.cfg_micro_conditions import CfgMicroConditions
from porter.rules.pipeline.cfg_restore_batch import CfgRestoreBatch
from porter.rules.pipeline.cfg_split_batch import CfgSplitBatch
from porter.rules.pipeline.denoising_loop import DenoisingLoopPasses
from porter.rules.pipeline.dp_last_group_output import DpLastGroupOutput
from porter.rules.pipeline.set_input_parameters import SetInputParameters
from porter.rules.pipeline.shared_latents import SharedLatents
from porter.rules.pipeline.whole_latents_formulas import WholeLatentsFormulas

RULES: tuple[type[Rule[Any]], ...] = (
    CallDecorators,
    SetInputParameters,
    CfgSplitBatch,
    CfgMicroConditions,
    DenoisingLoopPasses,
    SharedLatents,
    WholeLatentsFormulas,
    CfgBatchedCall,
    CfgHelperCall,
    CfgBranchCalls,
    CfgGuiderEntries,
    CfgRestoreBatch,
    DpLastGroupOutput,
)
