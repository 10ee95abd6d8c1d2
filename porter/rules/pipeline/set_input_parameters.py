"""The runtime learns the size of this run.

Match:    the statements of `__call__` that settle the batch size (and height and width).
Landmark: after the last of them and before the prompt is encoded; before the loop. Where
          one prompt alone is taken: above its encoding; in windows around the loop: above
          the windows.
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
            return self._of_one_prompt(module, facts, written)
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

    def _of_one_prompt(
        self, module: ParsedModule, facts: PipelineContext, written: list[set[str]]
    ) -> list[Edit]:
        """Where the runtime needs no batch size: above the statement that denoises, or
        above the encoding of a prompt that is no list."""
        source, loop = facts.source, facts.source.rewritten_loop
        if source.outer is None:
            return []
        place, anchor = len(written), source.outer
        if loop is not None and loop.around is None:
            encoding = [
                i for i, part in enumerate(source.before) if _encodes_prompt(part)
            ]
            if not encoding or not _takes_one_prompt(source.call):
                return []
            place, anchor = encoding[0], source.before[encoding[0]]
        known = set(source.parameters).union(*written[:place])
        return [self.insert_before(module, anchor, _call(known), blank=True)]

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


def _takes_one_prompt(call: cst.FunctionDef) -> bool:
    """Whether the hint of the prompt is a string alone."""
    return any(
        param.name.value == "prompt"
        and param.annotation is not None
        and dotted(param.annotation.annotation) == "str"
        for param in find(call.params, cst.Param)
    )
