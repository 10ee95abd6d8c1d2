"""Only the first stage turns latents into tokens.

Match:    `x = self.<module>(x)` where x is the stream of the latents.
Landmark: the last such statement before the first block loop that takes the latents.
Emit:     the statement under `if is_pipeline_first_stage():`, else a placeholder of the
          shape that the module gives.
Manual:   2.2

The manual leaves the latents in the variable on later stages; ours have the shape of
tokens there, because code between the embedding and the blocks reads it.
"""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst

from porter.analysis.forward import Forward
from porter.parsed import ParsedModule, Statement, dotted
from porter.rules.base import Edit, Rule


class FirstStagePosEmbed(Rule[Forward]):
    """Guards the patch embedding."""

    manual = "2.2"
    summary = "only the first stage turns latents into tokens"
    imports = (
        ("xfuser_runtime.distributed.parallel_state", "is_pipeline_first_stage"),
    )
    expect = (0, 1)

    def edits(self, module: ParsedModule, facts: Forward) -> Sequence[Edit]:
        """One nest around the embedding, where it is a plain call on the stream."""
        stream = facts.regions[0][1].latents
        found = [s for s in facts.before_regions if _embeds(s, stream)]
        if len(found) != 1 or stream is None:
            return []
        module_name = _embeds(found[0], stream)
        return [
            self.nest(
                module,
                found[0],
                found[0],
                header="if is_pipeline_first_stage():",
                footer=f"else:\n    {stream} = self._placeholder({module_name}, {stream})",
            )
        ]


def _embeds(statement: Statement, stream: str | None) -> str:
    """`self.module` of `stream = self.module(stream)`, else the empty string."""
    if stream is None or not isinstance(statement, cst.SimpleStatementLine):
        return ""
    assign = statement.body[0]
    if not (
        isinstance(assign, cst.Assign)
        and len(assign.targets) == 1
        and dotted(assign.targets[0].target) == stream
        and isinstance(assign.value, cst.Call)
        and len(assign.value.args) == 1
        and dotted(assign.value.args[0].value) == stream
    ):
        return ""
    name = dotted(assign.value.func)
    return name if name.startswith("self.") else ""
