"""Conditions that both guidance branches share are doubled only where one rank runs both.

Match:    an `if` on the guidance flag that does nothing but `X = torch.cat([X, X], dim=0)`,
          where nothing but the transformer call depends on X's batch afterwards.
Landmark: before the denoising loop.
Emit:     the same `if` with `and get_classifier_free_guidance_world_size() == 1`.
Manual:   1.1 step 3
"""

from __future__ import annotations

from porter.analysis.guidance import micro_conditions
from porter.parsed import ParsedModule
from porter.rules.base import Edit, Rule
from porter.rules.context import PipelineContext


class CfgMicroConditions(Rule[PipelineContext]):
    """See the module's docstring."""

    manual = "1.1 step 3"
    summary = "conditions doubled for guidance before the loop"
    imports = (
        (
            "xfuser_runtime.distributed.parallel_state",
            "get_classifier_free_guidance_world_size",
        ),
    )
    expect = (0, 4)

    def edits(self, module: ParsedModule, facts: PipelineContext) -> list[Edit]:
        """One changed header for each such `if`."""
        if facts.cfg_style != "batched":
            return []
        return [
            self.replace_header(
                module,
                doubled.condition,
                f"if {module.source(doubled.condition.test)}"
                " and get_classifier_free_guidance_world_size() == 1:",
            )
            for doubled in micro_conditions(facts.source)
        ]
