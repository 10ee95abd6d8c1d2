"""Says which modules inside the blocks run on the tokens of all ranks.

Match:    the `forward` of the class, where the probe measured such modules.
Landmark: the class attribute stands above it.
Emit:     above the other attributes, `gathered_modules`: where the tokens are in what each module takes and returns.
Manual:   2.1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from porter.analysis.forward import Forward
from porter.analysis.mixing import Gathered, TokenCut
from porter.parsed import ParsedModule
from porter.rules.base import Edit, Rule
from porter.rules.engine import excerpt
from porter.rules.format import INDENT, format_statements


class GatheredModules(Rule[Forward]):
    """Emits one class attribute of the wrapper."""

    manual = "2.1"
    summary = "says which modules run on the tokens of all ranks"
    reason = (
        "the probe finds such modules in any block, by running halves: routing of "
        "experts by choice is the first that nothing cheaper serves"
    )
    imports = (
        ("xfuser_runtime.layers", "GatheredModule"),
        ("xfuser_runtime.layers", "TokenCut"),
    )

    def expected(self, module: ParsedModule, facts: Forward) -> tuple[int, int]:
        """One match where there is such a module."""
        count = int(bool(facts.facts.mixing.gathered))
        return count, count

    def edits(self, module: ParsedModule, facts: Forward) -> Sequence[Edit]:
        """One insertion above `forward`."""
        gathered = facts.facts.mixing.gathered
        if not gathered:
            return []
        items = ", ".join(f'"{p}": {_module(item)}' for p, item in gathered.items())
        text = format_statements(f"gathered_modules = {{{items}}}\n", INDENT) + "\n"
        start, _ = excerpt(module, facts.method)
        return [self._edit(module, start, start, text, facts.method)]


def _module(item: Gathered) -> str:
    return (
        f'GatheredModule("{item.module}", {_cuts(item.inputs)}, {_cuts(item.outputs)})'
    )


def _cuts(cuts: Mapping[str, TokenCut]) -> str:
    return "{" + ", ".join(f'"{path}": {_cut(c)}' for path, c in cuts.items()) + "}"


def _cut(cut: TokenCut) -> str:
    text = f"{cut.dim}, {cut.streams!r}"
    if cut.rows:
        text += ", rows=True"
    if cut.repeats != 1:
        text += f", repeats={cut.repeats}"
    return f"TokenCut({text})"
