"""Of a guider's entries, each CFG rank computes its share.

Match:    the loop over the entries of a guider object, which calls the transformer once an
          entry, and the statement that combines them.
Landmark: inside the denoising loop.
Emit:     `self._cfg_entries(entries, attribute)` as the iterator,
          `self._cfg_entry_call(self.transformer)(...)`, and above the combination
          `self._check_guider(guider)`: not every guider keeps to what ranks and patches
          know.
Manual:   1.1 step 2. The manual knows the batched form alone.
"""

from __future__ import annotations

from porter.analysis.guider import guider_loop
from porter.parsed import ParsedModule
from porter.rules.base import Edit, Rule
from porter.rules.context import PipelineContext


class CfgGuiderEntries(Rule[PipelineContext]):
    """See the module's docstring."""

    manual = "1.1 step 2"
    summary = "the transformer calls for a guider's entries"
    expect = (0, 1)

    def edits(self, module: ParsedModule, facts: PipelineContext) -> list[Edit]:
        """The loop's header, the called name, and the check."""
        loop = facts.source.denoising
        found = guider_loop(module, loop) if loop else None
        if found is None:
            return []
        check = self.insert_before(
            module, found.combined, f"self._check_guider({found.guider})", at=found.loop
        )
        if facts.cfg_style != "entries":
            return [check]
        target, entries = module.source(found.loop.target), module.source(
            found.loop.iter
        )
        function = found.call.call.func
        return [
            self.replace_header(
                module,
                found.loop,
                f'for {target} in self._cfg_entries({entries}, "{found.attribute}"):',
            ),
            self.replace(
                module,
                function,
                f"self._cfg_entry_call({module.source(function)})",
                at=found.loop,
            ),
            check,
        ]
