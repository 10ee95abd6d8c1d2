"""Each CFG rank keeps its half of the guided prompt.

Match:    adjacent `X = torch.cat([negative_X, X], dim=0)` under the guidance flag, where
          nothing but the transformer call depends on X's batch afterwards.
Landmark: before the denoising loop.
Emit:     one `X, ... = self._process_cfg_split_batch(negative_X, X, ...)`.
Manual:   1.1 step 2. The manual's listing passes the positive prompt first; the order
          here is negative first, the order of the batch upstream makes.

Where the construct is missing or X has other uses nothing is lost: the transformer call
cuts every doubled argument (rule cfg_batched_call).
"""

from __future__ import annotations

from porter.analysis.guidance import split_batch
from porter.parsed import ParsedModule
from porter.rules.base import Edit, Rule
from porter.rules.context import PipelineContext


class CfgSplitBatch(Rule[PipelineContext]):
    """See the module's docstring."""

    manual = "1.1 step 2"
    summary = "the guided prompt batch made before the loop"
    expect = (0, 1)

    def edits(self, module: ParsedModule, facts: PipelineContext) -> list[Edit]:
        """The first statement becomes the split, the others go."""
        doubled = split_batch(facts.source) if facts.cfg_style == "batched" else None
        if doubled is None:
            return []
        first, *rest = doubled.statements
        targets = ", ".join(doubled.names)
        arguments = ", ".join(f"{other}, {name}" for other, name in doubled.pairs)
        text = f"{targets} = self._process_cfg_split_batch({arguments})"
        at = doubled.condition
        removed = [self.remove(module, part, at=at) for part in rest]
        return [self.replace(module, first, text, at=at), *removed]
