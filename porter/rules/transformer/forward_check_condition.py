"""The `forward` is counted and checked before it runs.

Match:    the `forward` of the class.
Landmark: above its own decorators.
Emit:     `@xFuserTransformerBaseWrapper.forward_check_condition`.
Manual:   2
"""

from __future__ import annotations

from collections.abc import Sequence

from porter.analysis.forward import Forward
from porter.parsed import ParsedModule
from porter.rules.base import Edit, Rule
from porter.rules.engine import excerpt
from porter.rules.format import INDENT


class ForwardCheckCondition(Rule[Forward]):
    """Decorates `forward`."""

    manual = "2"
    summary = "the forward is counted and checked before it runs"

    def edits(self, module: ParsedModule, facts: Forward) -> Sequence[Edit]:
        """One decorator line."""
        start, _ = excerpt(module, facts.method)
        text = f"{INDENT}@xFuserTransformerBaseWrapper.forward_check_condition\n"
        return [self._edit(module, start, start, text, facts.method)]
