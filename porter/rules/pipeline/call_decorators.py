"""`__call__` runs under the wrapper's two decorators.

Match:    the decorators of `__call__`.
Emit:     `@torch.no_grad()`, `enable_data_parallel`, `check_to_use_naive_forward`, then any
          other decorator of upstream. The decorator that only fills in the docstring's
          example goes: its example shows the upstream class.
Landmark: directly above `def __call__`.
Manual:   1. The order is fixed: data parallelism must be set up before the choice to run
          upstream's own forward is made.
"""

from __future__ import annotations

import libcst as cst

from porter.parsed import ParsedModule, dotted
from porter.rules.base import Edit, Rule
from porter.rules.context import PipelineContext
from porter.rules.format import indent_block

_OURS = (
    "@xFuserPipelineBaseWrapper.enable_data_parallel",
    "@xFuserPipelineBaseWrapper.check_to_use_naive_forward",
)


class CallDecorators(Rule[PipelineContext]):
    """See the module's docstring."""

    manual = "1"
    summary = "the decorators of __call__"

    def edits(self, module: ParsedModule, facts: PipelineContext) -> list[Edit]:
        """One edit over all decorators, or an insertion where there are none."""
        call = facts.source.call
        kept = [
            module.source(node)
            for node in call.decorators
            if _name(node) != "replace_example_docstring"
        ]
        first = [text for text in kept if "no_grad" in text or "inference_mode" in text]
        rest = [text for text in kept if text not in first]
        text = indent_block(
            "\n".join([*first, *_OURS, *rest]), module.indentation(call)
        )
        if not call.decorators:
            start = module.line_start(module.line(call))
            return [self._edit(module, start, start, text + "\n", call)]
        start = module.line_start(module.line(call.decorators[0]))
        end = module.line_end(module.last_line(call.decorators[-1]))
        return [self._edit(module, start, end, text, call)]


def _name(node: cst.Decorator) -> str:
    inner = node.decorator
    return dotted(inner.func if isinstance(inner, cst.Call) else inner)
