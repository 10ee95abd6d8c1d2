"""A mask of all keys stays whole where a rank has fewer of them.

Match:    `attn.prepare_attention_mask(mask, length, ...)` of the attention module in the
          processor's `__call__`; the probe measured that the method pads the mask on part
          of the tokens.
Landmark: above the attention call.
Emit:     the mask's own length in place of the number of this rank's keys.
Manual:   4
"""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst

from porter.analysis.processor import Processor
from porter.parsed import ParsedModule, dotted, find
from porter.rules.base import Edit, Rule

_METHOD = "prepare_attention_mask"


class WholeMasks(Rule[Processor]):
    """Replaces the local token count that a mask is padded by."""

    manual = "4"
    summary = "a mask of all keys keeps its length"
    reason = (
        "the library's own method pads masks: any processor that calls it where keys are"
        " split needs this, and nothing but the mask's own length is right"
    )

    def expected(self, module: ParsedModule, facts: Processor) -> tuple[int, int]:
        """At least one match where a mask was measured to be padded."""
        return (1, 9) if facts.pads else (0, 0)

    def edits(self, module: ParsedModule, facts: Processor) -> Sequence[Edit]:
        """One edit a mask."""
        if not facts.pads:
            return []
        return [
            self.replace(
                module, call.args[1].value, f"{dotted(call.args[0].value)}.shape[-1]"
            )
            for call in find(facts.method, cst.Call)
            if dotted(call.func) == f"{facts.attention}.{_METHOD}"
            and len(call.args) > 1
            and dotted(call.args[0].value)
            and call.args[0].keyword is call.args[1].keyword is None
        ]
