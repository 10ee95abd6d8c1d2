"""Tokens that a mask leaves out stay where they are, and the mask goes with the keys.

Match:    in the processor's `__call__`, `torch.nonzero(mask)`, flattened, that indexes text
          tokens; the probe measured that the processor picks tokens.
Landmark: before the attention call; what is picked is concatenated behind the other tokens.
Emit:     the attention module's indices of all tokens in its place, and the mask as an
          argument of the attention call: a rank's part of the picked tokens has another
          length on each rank.
Manual:   4
"""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst

from porter.analysis.processor import Processor
from porter.errors import RuleError
from porter.parsed import ParsedModule, dotted, find, walk
from porter.rules.base import Edit, Rule

_KERNEL = "scaled_dot_product_attention"


class PresentTokens(Rule[Processor]):
    """Replaces the indices, and hands the mask on."""

    manual = "4"
    summary = "tokens that a mask leaves out stay, their mask goes with the keys"
    reason = (
        "ranks would pick different numbers of tokens; masks of keys are what the "
        "runtime has, and a processor that picks is recognised by measurement"
    )

    def expected(self, module: ParsedModule, facts: Processor) -> tuple[int, int]:
        """One match where tokens are picked."""
        return int(facts.selects), int(facts.selects)

    def edits(self, module: ParsedModule, facts: Processor) -> Sequence[Edit]:
        """The indices and the argument.

        Raises:
            RuleError: the picked tokens do not stand last, or no kernel call takes them.
        """
        if not facts.selects:
            return []
        found = [assign for assign in find(facts.method, cst.Assign) if _mask(assign)]
        if len(found) != 1:
            return []
        assign, mask = found[0], _mask(found[0])
        assert mask is not None
        name = dotted(assign.targets[0].target)
        calls = [
            call
            for call in find(facts.method, cst.Call)
            if dotted(call.func).rpartition(".")[2] == _KERNEL
        ]
        if len(calls) != 1 or not calls[0].args or not _stand_last(facts.method, name):
            raise RuleError(
                f"tokens that {facts.class_name} picks by {name}",
                expected=f"them behind the other tokens, and one call of {_KERNEL}",
                where=module.where(assign),
            )
        text, last = module.source(mask), calls[0].args[-1]
        kept = module.source(last).rstrip().rstrip(",")
        return [
            self.replace(
                module,
                assign.value,
                f"{facts.attention}.present_tokens({text})",
                at=assign,
            ),
            self.replace(module, last, f"{kept}, present={text}", at=assign),
        ]


def _mask(assign: cst.Assign) -> cst.BaseExpression | None:
    """The mask of `x = torch.nonzero(mask, ...).flatten()`."""
    value = assign.value
    if not (isinstance(value, cst.Call) and isinstance(value.func, cst.Attribute)):
        return None
    inner = value.func.value
    if value.func.attr.value != "flatten" or not isinstance(inner, cst.Call):
        return None
    return inner.args[0].value if dotted(inner.func) == "torch.nonzero" else None


def _stand_last(method: cst.FunctionDef, indices: str) -> bool:
    """Whether all that `indices` picks is put behind other tokens, and nowhere else."""
    picked = {
        dotted(assign.targets[0].target)
        for assign in find(method, cst.Assign)
        if isinstance(assign.value, cst.Subscript)
        and any(dotted(node) == indices for node in walk(assign.value))
    }
    lasts = set()
    for call in find(method, cst.Call):
        if dotted(call.func) != "torch.cat" or not call.args:
            continue
        items = call.args[0].value
        if isinstance(items, cst.List | cst.Tuple) and len(items.elements) > 1:
            *others, last = (dotted(item.value) for item in items.elements)
            if picked & set(others):
                return False
            lasts.add(last)
    return bool(picked) and picked <= lasts
