"""Stages that are not the last learn the whole latents where more than the transformer reads them.

Match:    a loop whose steps call another model on the latents, such as a ControlNet, or
          that stands in another loop, whose body goes on with the latents.
Landmark: above the denoising loop.
Emit:     `self._share_latents(...)`: at the end of each of the "steps", or of the "loop".
Manual:   1.1 step 4. The manual has no such pipeline: its first stage alone gets the latents.
"""

from __future__ import annotations

from porter.parsed import ParsedModule
from porter.rules.base import Edit, Rule
from porter.rules.context import PipelineContext


class SharedLatents(Rule[PipelineContext]):
    """See the module's docstring."""

    manual = "1.1 step 4"
    summary = "whole latents for every stage"

    def edits(self, module: ParsedModule, facts: PipelineContext) -> list[Edit]:
        """One statement above the loop."""
        loop = facts.source.rewritten_loop
        if loop is None or not facts.shared:
            return []
        text = f'self._share_latents("{facts.shared}")'
        return [self.insert_before(module, loop.frame, text, at=loop.loop)]

    def expected(self, module: ParsedModule, facts: PipelineContext) -> tuple[int, int]:
        """One, where stages need it."""
        wanted = int(bool(facts.shared))
        return wanted, wanted
