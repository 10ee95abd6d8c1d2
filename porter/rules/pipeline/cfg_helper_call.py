"""A model that feeds the transformer's call runs for one branch on each CFG rank.

Match:    in the denoising loop, the call of a model beside the transformer whose output goes
          into the transformer's call and nowhere else, where the probe found that each
          branch has a length of its own.
Landmark: inside the denoising loop, above the transformer's call.
Emit:     `self._cfg_helper_call(self.controlnet, {argument: axis})(...)`; the axes are what
          the probe measured.
Manual:   1.1 step 2. The manual knows no second model in a step.
"""

from __future__ import annotations

from porter.analysis.facts import axes_literal
from porter.parsed import ParsedModule
from porter.rules.base import Edit, Rule
from porter.rules.context import PipelineContext


class CfgHelperCall(Rule[PipelineContext]):
    """See the module's docstring."""

    manual = "1.1 step 2"
    summary = "the call of a model that feeds the transformer's"
    expect = (0, 2)

    def edits(self, module: ParsedModule, facts: PipelineContext) -> list[Edit]:
        """The called name of each."""
        loop = facts.source.denoising
        if loop is None or facts.cfg_style != "batched":
            return []
        rewritten = loop is facts.source.rewritten_loop
        batch = "" if rewritten else f", {loop.latents[0]}.shape[0]"
        return [
            self.replace(
                module,
                call.func,
                f"self._cfg_helper_call({module.source(call.func)},"
                f" {axes_literal(facts.facts.cfg_helper_axes[name])}{batch})",
                at=call,
            )
            for call, name in facts.split_helpers.items()
        ]
