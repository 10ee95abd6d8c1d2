"""Only the last rank of a data-parallel group decodes and returns.

Match:    the first statement after the denoising loop that reads `output_type` or the
          VAE, and all that follows it.
Landmark: after the statement that holds the denoising loop: an `output_type` read before
          the loop is no match.
Emit:     the same statements under `if is_dp_last_group():`; other ranks free their hooks
          and return None.
Manual:   1.1 step 5. Where `__call__` has no loop of its own and the output is made in
          another method, the decorator alone returns None. The manual returns None without freeing the hooks, which leaves
          offloaded weights on the device.
"""

from __future__ import annotations

import libcst as cst

from porter.errors import RuleError
from porter.parsed import ParsedModule, Statement, dotted, find
from porter.rules.base import Edit, Rule
from porter.rules.context import PipelineContext

_FREE = "self.maybe_free_model_hooks"


class DpLastGroupOutput(Rule[PipelineContext]):
    """See the module's docstring."""

    manual = "1.1 step 5"
    summary = "the output stage after the loop"
    imports = (("xfuser_runtime.distributed.parallel_state", "is_dp_last_group"),)

    def edits(self, module: ParsedModule, facts: PipelineContext) -> list[Edit]:
        """One nest over the output stage."""
        after = list(facts.source.after)
        first = next((part for part in after if _makes_output(part)), None)
        if first is None:
            return []
        last = after[-1]
        if not any(find(last, cst.Return)):
            raise RuleError(
                "an output stage that does not end in a return",
                expected="a return as the last statement of __call__",
                where=module.where(last),
            )
        frees = any(
            dotted(node.func) == _FREE
            for part in after
            for node in find(part, cst.Call)
        )
        free = f"    {_FREE}()\n" if frees else ""
        return [
            self.nest(
                module,
                first,
                last,
                header="if is_dp_last_group():",
                footer=f"else:\n{free}    return None",
            )
        ]

    def expected(self, module: ParsedModule, facts: PipelineContext) -> tuple[int, int]:
        """One output stage; it may be missing where `__call__` has no loop."""
        return int(facts.source.denoising is not None), 1


def _makes_output(part: Statement) -> bool:
    return any(node.value == "output_type" for node in find(part, cst.Name)) or any(
        dotted(node).startswith("self.vae.") for node in find(part, cst.Attribute)
    )
