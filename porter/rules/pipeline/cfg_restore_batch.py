"""A callback sees both guidance branches, as it does upstream.

Match:    `if callback_on_step_end is not None:` in the loop's tail, where rule
          cfg_split_batch has cut names before the loop.
Landmark: in the tail of the denoising loop.
Emit:     `X, ... = self._restore_cfg_batch(X, ...)` at the top of its body.
Manual:   1.1 step 2. The manual's example has no such callback.
"""

from __future__ import annotations

from porter.analysis.guidance import split_batch
from porter.analysis.jumps import statements
from porter.parsed import ParsedModule
from porter.rules.base import Edit, Rule
from porter.rules.context import PipelineContext


class CfgRestoreBatch(Rule[PipelineContext]):
    """See the module's docstring."""

    manual = "1.1 step 2"
    summary = "the callback at the end of a guided step"
    expect = (0, 1)

    def edits(self, module: ParsedModule, facts: PipelineContext) -> list[Edit]:
        """One statement above the callback's own."""
        loop = facts.source.denoising
        block = loop.callback_block if loop else None
        doubled = split_batch(facts.source) if facts.cfg_style == "batched" else None
        if block is None or doubled is None:
            return []
        names = ", ".join(doubled.names)
        return [
            self.insert_before(
                module,
                statements(block.body)[0],
                f"{names} = self._restore_cfg_batch({names})",
                at=block,
            )
        ]
