"""Says which layers and attention modules of the transformer are wrapped.

Match:    the `forward` of the class.
Landmark: the class attributes stand above it.
Emit:     `submodule_classes_to_wrap`, `submodule_name_to_wrap`, the streams that the keys
          of each wrapped attention hold, those of its queries where they differ, the
          streams that stay whole on every rank, masks that need completing, layers over rows,
          processors that look at the whole batch, and what code outside of the loops reads of single blocks.
Manual:   2.1

The manual hands these to `__init__`; ours are class attributes, since the wrapper defines
no `__init__` that diffusers would read as upstream's.
"""

from __future__ import annotations

from collections.abc import Sequence

from porter.analysis.forward import Forward
from porter.parsed import ParsedModule
from porter.rules.base import Edit, Rule
from porter.rules.engine import excerpt
from porter.rules.format import INDENT, format_statements


class InitSubmodules(Rule[Forward]):
    """Emits the class attributes of the wrapper."""

    manual = "2.1"
    summary = "says which layers and attention modules are wrapped"

    def edits(self, module: ParsedModule, facts: Forward) -> Sequence[Edit]:
        """One insertion above `forward`."""
        measured = facts.facts
        names = sorted({path.rpartition(".")[2] for path in measured.attention})
        classes = ", ".join(_reference(name) for name in measured.layers)
        text = (
            f"submodule_classes_to_wrap = [{classes}]\n"
            f"submodule_name_to_wrap = {names!r}\n"
            f"attention_streams = {dict(measured.attention)!r}\n"
            f"block_loops = {tuple(loop.blocks for loop in measured.loops)!r}\n"
        )
        whole = {loop.blocks: loop.whole for loop in measured.loops if loop.whole}
        if measured.queries:
            text += f"attention_queries = {dict(measured.queries)!r}\n"
        if whole:
            text += f"whole_streams = {whole!r}\n"
        if measured.mixing.outer_masks:
            text += f"outer_masks = {dict(measured.mixing.outer_masks)!r}\n"
        if measured.mixing.row_layers:
            text += f"row_layers = {dict(measured.mixing.row_layers)!r}\n"
        kinds = {loop.blocks: loop.classes for loop in measured.loops if loop.classes}
        kinds |= {n: c for loop in measured.loops for n, c in loop.companions.items()}
        if kinds:
            text += f"block_classes = {kinds!r}\n"
        if measured.batch_processors:
            text += f"batch_processors = {measured.batch_processors!r}\n"
        if facts.block_parts:
            text += f"block_parts = {facts.block_parts!r}\n"
        start, _ = excerpt(module, facts.method)
        text = format_statements(text, INDENT) + "\n\n"
        return [self._edit(module, start, start, text, facts.method)]


def _reference(qualified: str) -> str:
    """How the generated module names a layer class."""
    module, _, name = qualified.rpartition(".")
    return f"nn.{name}" if module.startswith("torch.nn.") else name
