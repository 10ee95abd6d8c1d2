"""Sums over tokens are sums over the tokens of all ranks.

Match:    the expressions of the processor's `__call__` that the probe measured to be such
          sums: linear attention's products of keys and values, and its normaliser.
Emit:     the same expression inside a call of the attention module's method, which adds
          what the other ranks have.
Manual:   4
"""

from __future__ import annotations

from collections.abc import Sequence

from porter.analysis.processor import Processor
from porter.errors import RuleError
from porter.parsed import ParsedModule
from porter.rules.base import Edit, Rule


class TokenSums(Rule[Processor]):
    """Wraps the measured expressions."""

    manual = "4"
    summary = "sums over tokens are sums over the tokens of all ranks"

    def expected(self, module: ParsedModule, facts: Processor) -> tuple[int, int]:
        """One match an expression."""
        return len(facts.token_sums), 9 if facts.token_sums else 0

    def edits(self, module: ParsedModule, facts: Processor) -> Sequence[Edit]:
        """One edit an expression.

        Raises:
            RuleError: a measured expression is not in the text.
        """
        found = [(module.source(node), node) for node in facts.contractions]
        for text in facts.token_sums:
            if text not in [source for source, _ in found]:
                raise RuleError(
                    f"no {text} in {facts.class_name}",
                    expected="the expression that was measured",
                    where=module.where(facts.method),
                )
        return [
            self.replace(module, node, f"{facts.attention}.sum_over_tokens({text})")
            for text, node in found
            if text in facts.token_sums
        ]
