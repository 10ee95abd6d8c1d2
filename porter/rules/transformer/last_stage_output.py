"""Only the last stage turns tokens back into latents.

Match:    the statements between the last block loop and the return, where `output` is the
          only name of theirs that is read afterwards.
Landmark: after the last block loop.
Emit:     the same statements under `if is_pipeline_last_stage():`, else zeros.
Manual:   2.2

The manual returns the hidden states on other stages; ours return zeros of the output's
shape, so that the pipeline's code after the call runs alike on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst

from porter.analysis.forward import Forward
from porter.parsed import ParsedModule, Statement, find
from porter.rules.base import Edit, Rule
from porter.scope import reads, writes


class LastStageOutput(Rule[Forward]):
    """Guards the tail of `forward`."""

    manual = "2.2"
    summary = "only the last stage turns tokens back into latents"
    imports = (("xfuser_runtime.distributed.parallel_state", "is_pipeline_last_stage"),)
    expect = (0, 1)

    def edits(self, module: ParsedModule, facts: Forward) -> Sequence[Edit]:
        """One nest around the tail, where its only result is one tensor."""
        tail, ending = _split(facts.after_regions)
        if not tail or not ending:
            return []
        written = set().union(*(writes(module, statement) for statement in tail))
        read = set().union(*(reads(module, statement) for statement in ending))
        results = written & read
        if len(results) != 1:
            return []
        return [
            self.nest(
                module,
                tail[0],
                tail[-1],
                header="if is_pipeline_last_stage():",
                footer=f"else:\n    {results.pop()} = self._zero_output()",
            )
        ]


def _split(
    statements: Sequence[Statement],
) -> tuple[Sequence[Statement], Sequence[Statement]]:
    """Statements before the first one that returns, and the rest."""
    for index, statement in enumerate(statements):
        if next(find(statement, cst.Return), None) is not None:
            return statements[:index], statements[index:]
    return statements, ()
