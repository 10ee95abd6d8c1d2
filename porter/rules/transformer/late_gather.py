"""What maps each token by itself behind the last block loop runs on this rank's tokens.

Match:    the statements right after the last loop that the probe found to do so.
Landmark: after the last of them.
Emit:     the whole of what they make of the latents' stream, in place of the stream's
          directly after the loop.
Manual:   2

They end with the projection to a patch's channels, a small part of the blocks' width: less
travels, and no rank computes the rows of another.  Where several names hold tokens
afterwards, or a value is given by token besides, the stream is gathered after the loop.
"""

from __future__ import annotations

from collections.abc import Sequence

from porter.analysis.forward import Forward
from porter.analysis.tail import tail_statements
from porter.parsed import ParsedModule
from porter.rules.base import Edit, Rule
from porter.rules.transformer.block_region import gathered


class LateGather(Rule[Forward]):
    """Gathers what the tail makes of the stream."""

    manual = "2"
    summary = "what maps each token by itself runs on this rank's tokens"

    def expected(self, module: ParsedModule, facts: Forward) -> tuple[int, int]:
        """One match where a tail was measured."""
        count = sum(loop.tail is not None for loop in facts.facts.loops)
        return count, count

    def edits(self, module: ParsedModule, facts: Forward) -> Sequence[Edit]:
        """One insertion behind the tail, where its statements are those measured."""
        edits: list[Edit] = []
        for loop, measured in facts.regions:
            tail = measured.tail
            if tail is None:
                continue
            found = tail_statements(module, facts.method, loop, tail.stream)
            found = found[: len(tail.statements)]
            if tuple(map(module.source, found)) == tail.statements:
                text = gathered(tail.result, measured.values[tail.stream][0])
                edits.append(self.insert_after(module, found[-1], text))
        return edits
