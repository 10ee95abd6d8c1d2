"""Of two transformer calls a step, each CFG rank makes one.

Match:    the two transformer calls of the denoising loop, the second independent of the
          first and under a guard that is known before the first.
Landmark: inside the denoising loop.
Emit:     `self._cfg_branch_call(self.transformer, 0, <guard>)(...)`, the same with 1 and
          True for the second, and an exchange of both outputs after the second, once it is cut as the first is.
Manual:   1.1 step 2. The manual knows the batched form alone.
"""

from __future__ import annotations

from porter.analysis.pipeline_modes import exchange_place, live_outputs
from porter.parsed import ParsedModule
from porter.rules.base import Edit, Rule
from porter.rules.context import PipelineContext


class CfgBranchCalls(Rule[PipelineContext]):
    """See the module's docstring."""

    manual = "1.1 step 2"
    summary = "the two transformer calls of a guided step"

    def edits(self, module: ParsedModule, facts: PipelineContext) -> list[Edit]:
        """Both called names, and the exchange."""
        loop = facts.source.denoising
        if loop is None or facts.cfg_style != "sequential":
            return []
        first, second = loop.calls
        guards = second.guards[len(first.guards) :]
        guard = " and ".join(f"({test})" for test in guards)
        if len(guards) == 1:
            guard = guards[0]
        branches = ((first, 0, guard or "True"), (second, 1, "True"))
        pair = ", ".join(live_outputs(module, loop))
        return [
            *(
                self.replace(
                    module,
                    call.call.func,
                    f"self._cfg_branch_call({module.source(call.call.func)},"
                    f" {branch}, {runs})",
                    at=loop.loop,
                )
                for call, branch, runs in branches
            ),
            self.insert_after(
                module,
                exchange_place(module, loop),
                f"{pair} = self._cfg_exchange_branches({pair})",
                at=loop.loop,
            ),
        ]

    def expected(self, module: ParsedModule, facts: PipelineContext) -> tuple[int, int]:
        """One loop with sequential guidance, else none."""
        wanted = int(facts.cfg_style == "sequential")
        return wanted, wanted
