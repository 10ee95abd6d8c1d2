"""Formulas over all rows of the latents are refused where passes see one patch each.

Match:    statements of the loop's body with a statistic over whole latents, such as
          `noise_pred.std()` or a call of the file's own function that holds one.
Landmark: inside the denoising loop.
Emit:     `self._refuse_patches(...)` above each of them: most stand under a switch that is
          off, and the message names the formula.
Manual:   1.1 step 4. The manual says nothing of such formulas.
"""

from __future__ import annotations

from porter.analysis.patches import cross_row_formulas
from porter.parsed import ParsedModule
from porter.rules.base import Edit, Rule
from porter.rules.context import PipelineContext


class WholeLatentsFormulas(Rule[PipelineContext]):
    """See the module's docstring."""

    manual = "1.1 step 4"
    summary = "formulas over all rows of the latents"
    expect = (0, 8)

    def edits(self, module: ParsedModule, facts: PipelineContext) -> list[Edit]:
        """One statement above each formula."""
        loop = facts.source.rewritten_loop
        if loop is None or "pipefusion" in facts.refused_modes:
            return []
        return [
            self.insert_before(
                module, found.statement, f'self._refuse_patches("{found.call}")'
            )
            for found in cross_row_formulas(module, loop)
        ]
