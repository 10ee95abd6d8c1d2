"""A transformer call on the guided batch runs one branch on each CFG rank.

Match:    the transformer call of the denoising loop (alternatives in separate branches of
          an `if` count as one; a further call on one branch alone is left as it is).
Landmark: inside the denoising loop.
Emit:     `cfg_transformer = self._cfg_batched_call(self.transformer, {argument: axis})`
          above the call, and the call of that name; the axes are what the probe measured. Where the
          loop stays upstream's, the batch size of the latents is a third argument; where the
          latents carry both branches through the scheduler, half of it.
Manual:   1.1 step 2, made at the call: it also holds where the batch is doubled in the
          loop or in a helper, which the manual's edit does not reach.
"""

from __future__ import annotations

from porter.analysis.facts import axes_literal
from porter.analysis.pipeline_modes import doubled_calls
from porter.parsed import ParsedModule
from porter.rules.base import Edit, Rule
from porter.rules.context import PipelineContext

_NAME = "cfg_transformer"


class CfgBatchedCall(Rule[PipelineContext]):
    """See the module's docstring."""

    manual = "1.1 step 2"
    summary = "the transformer call on the guided batch"

    def edits(self, module: ParsedModule, facts: PipelineContext) -> list[Edit]:
        """The split above each call, and the called name."""
        loop = facts.source.denoising
        if loop is None or facts.cfg_style != "batched":
            return []
        axes = axes_literal(facts.facts.cfg_axes)
        batch = ""
        if facts.facts.cfg_style == "carried":
            batch = f", {loop.latents[0]}.shape[0] // 2"
        elif loop is not facts.source.rewritten_loop:
            # A loop that stays upstream's does not tell the runtime its latents.
            batch = f", {loop.latents[0]}.shape[0]"
        found = []
        for call in doubled_calls(module, loop):
            name = module.source(call.call.func)
            split = f"{_NAME} = self._cfg_batched_call({name}, {axes}{batch})"
            found += [
                self.insert_before(module, call.statement, split, at=loop.loop),
                self.replace(module, call.call.func, _NAME, at=loop.loop),
            ]
        return found

    def expected(self, module: ParsedModule, facts: PipelineContext) -> tuple[int, int]:
        """One loop with batched guidance, else none."""
        wanted = int(facts.cfg_style == "batched")
        return wanted, wanted
