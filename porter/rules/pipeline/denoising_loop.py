"""The loop makes one pass a step while it warms up, then one pass a patch.

Match:    the loop over the timesteps, its interrupt check and its tail.
Landmark: the loop calls the transformer and steps the scheduler; the tail stands after
          the last step of the scheduler.
Emit:     an iterator of warm-up passes and of patch passes, the receive at the top of the
          body (below the interrupt check) and the commit above the tail, which runs once
          a step.  Where a test leaves a step out by `continue`, its pass hands over the
          latents as they are; before a `break` on interruption all ranks agree on it.
          Several latents, each with a scheduler, are received and committed together.
Manual:   1.1 step 4. The manual moves the loop's body into the base class; here it stays
          in its frame, because callbacks read `locals()`, and its iterator does the work.
"""

from __future__ import annotations

import libcst as cst

from porter.analysis.denoising import DenoisingLoop
from porter.analysis.jumps import statements
from porter.analysis.pipeline_source import CALLBACKS
from porter.parsed import ParsedModule
from porter.rules.base import Edit, Rule
from porter.rules.context import PipelineContext

_BEFORE = "latents_before_pass"
_WARMUP = "num_pipeline_warmup_steps"
_TAIL = "if not self._step_is_complete():\n    continue"


class DenoisingLoopPasses(Rule[PipelineContext]):
    """See the module's docstring."""

    manual = "1.1 step 4"
    summary = "the denoising loop"
    imports = (
        ("itertools", "chain"),
        ("xfuser_runtime.distributed.runtime_state", "get_runtime_state"),
    )

    def edits(self, module: ParsedModule, facts: PipelineContext) -> list[Edit]:
        """Warm-up length, header, receive and commit."""
        source = facts.source
        loop = source.rewritten_loop
        if loop is None:
            return []
        given = [name for name in CALLBACKS if name in source.parameters]
        callback = f", callback={' or '.join(given)}" if given else ""
        return [
            self.insert_before(
                module,
                loop.frame,
                f"{_WARMUP} = get_runtime_state().runtime_config.warmup_steps",
                at=loop.loop,
            ),
            self.replace_header(
                module,
                loop.loop,
                f"for {module.source(loop.loop.target)} in chain("
                f"self._sync_pipeline({module.source(loop.loop.iter)}, {_WARMUP}{callback}),"
                " self._async_pipeline()):",
            ),
            self._receive(module, loop),
            self._commit(module, loop),
            *(self._skip(module, loop, test) for test in loop.skips),
            *(
                self.insert_before(
                    module, test, "self._agree_to_interrupt()", at=loop.loop
                )
                for test in loop.stops
            ),
        ]

    def _skip(self, module: ParsedModule, loop: DenoisingLoop, test: cst.If) -> Edit:
        """A pass that is left out hands over what it received."""
        names = ", ".join(loop.latents)
        text = f"{names} = self._skip_patch({names})\n{_TAIL}"
        return self.insert_before(module, statements(test.body)[0], text, at=loop.loop)

    def expected(self, module: ParsedModule, facts: PipelineContext) -> tuple[int, int]:
        """One loop, none where it stays upstream's."""
        wanted = int(facts.source.rewritten_loop is not None)
        return wanted, wanted

    def _receive(self, module: ParsedModule, loop: DenoisingLoop) -> Edit:
        names = ", ".join(loop.latents)
        text = f"{_BEFORE} = {names} = self._receive_patch({names})"
        if loop.in_place:
            # The body stores into the latents: what it started from must be a copy.
            copies = ", ".join(
                f"{name}.clone()" if name in loop.in_place else name
                for name in loop.latents
            )
            text = f"{names} = self._receive_patch({names})\n{_BEFORE} = {copies}"
        if loop.interrupt is not None:
            return self.insert_after(
                module, loop.interrupt, text, at=loop.loop, blank=True
            )
        return self.insert_before(module, loop.body[0], text, at=loop.loop, blank=True)

    def _commit(self, module: ParsedModule, loop: DenoisingLoop) -> Edit:
        names = ", ".join(loop.latents)
        commit = f"{names} = self._commit_patch({_BEFORE}, {names})"
        if not loop.tail:
            return self.insert_after(
                module, loop.body[-1], commit, at=loop.loop, blank=True
            )
        text = f"{commit}\n{_TAIL}"
        return self.insert_before(module, loop.tail[0], text, at=loop.loop, blank=True)
