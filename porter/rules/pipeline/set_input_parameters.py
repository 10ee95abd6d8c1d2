"""The runtime learns the size of this run.

Match:    the statements of `__call__` that settle the batch size (and height and width).
Landmark: after the last of them and before the prompt is encoded; before the loop. Where
          one prompt alone is taken, in windows around the loop: above the windows.
Emit:     `get_runtime_state().set_input_parameters(...)` with those of height, width,
          batch_size and num_inference_steps that exist in the frame by then.
Manual:   1.1 step 1
"""

from __future__ import annotations

import libcst as cst

from porter.parsed import ParsedModule, Statement, dotted, find
from porter.rules.base import Edit, Rule
from porter.rules.context import PipelineContext
from porter.scope import writes

_NAMES = ("height", "width", "batch_size", "num_inference_steps")


class SetInputParameters(Rule[PipelineContext]):
    """See the module's docstring."""

    manual = "1.1 step 1"
    summary = "where the batch size is known"
    imports = (("xfuser_runtime.distributed.runtime_state", "get_runtime_state"),)

    def edits(self, module: ParsedModule, facts: PipelineContext) -> list[Edit]:
        """One call, above the statement that encodes the prompt where there is one."""
        source = facts.source
        before = list(source.before)
        written = [writes(module, part) for part in before]
        known = set(source.parameters)
        settled = [i for i, names in enumerate(written) if "batch_size" in names][:1]
        if not settled:
            known |= {name for names in written for name in names}
            return self._above_windows(module, facts, known)
        encoding = [i for i, part in enumerate(before) if _encodes_prompt(part)]
        limit = encoding[0] if encoding and encoding[0] > settled[0] else len(before)
        settled += [
            i for i in range(limit) if written[i] & {"height", "width"} and i < limit
        ]
        place = max(settled)
        known |= {name for names in written[: place + 1] for name in names}
        text = _call(known)
        anchor = before[settled[0]]
        if limit < len(before):
            return [
                self.insert_before(module, before[limit], text, at=anchor, blank=True)
            ]
        return [self.insert_after(module, before[place], text, at=anchor, blank=True)]

    def _above_windows(
        self, module: ParsedModule, facts: PipelineContext, known: set[str]
    ) -> list[Edit]:
        """Above the statement that denoises, where the runtime needs no batch size."""
        source, loop = facts.source, facts.source.rewritten_loop
        if source.outer is None or (loop is not None and loop.around is None):
            return []
        return [self.insert_before(module, source.outer, _call(known), blank=True)]

    def expected(self, module: ParsedModule, facts: PipelineContext) -> tuple[int, int]:
        """One place; it may be missing where `__call__` has no loop."""
        return int(facts.source.denoising is not None), 1


def _call(known: set[str]) -> str:
    arguments = ", ".join(f"{name}={name}" for name in _NAMES if name in known)
    return (
        "# the runtime derives shapes and the order of passes from these\n"
        f"get_runtime_state().set_input_parameters({arguments},)"
    )


def _encodes_prompt(part: Statement) -> bool:
    return any(
        dotted(node.func) == "self.encode_prompt" for node in find(part, cst.Call)
    )
