"""The attention of a processor is the attention of the module that it serves.

Match:    calls of torch's `scaled_dot_product_attention` and of diffusers'
          `dispatch_attention_fn` in the processor's `__call__`.
Landmark: inside the method whose first parameter is the attention module.
Emit:     the same call as a method of the attention module, which knows how its tokens
          are spread over ranks and patches.
Manual:   4
"""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst

from porter.analysis.processor import Processor
from porter.parsed import ParsedModule, dotted, find
from porter.rules.base import Edit, Rule

_KERNELS = ("scaled_dot_product_attention", "dispatch_attention_fn")


class AttentionCall(Rule[Processor]):
    """Turns the kernel call into a call of the attention module's method."""

    manual = "4"
    summary = "the attention call goes through the attention module"

    def expected(self, module: ParsedModule, facts: Processor) -> tuple[int, int]:
        """At least one call, unless the attention is made of sums over tokens."""
        return (0 if facts.token_sums else 1), 9

    def edits(self, module: ParsedModule, facts: Processor) -> Sequence[Edit]:
        """One edit a kernel call."""
        return [
            self.replace(module, call.func, f"{facts.attention}.{name}", at=call)
            for call in find(facts.method, cst.Call)
            if (name := dotted(call.func).rpartition(".")[2]) in _KERNELS
        ]
