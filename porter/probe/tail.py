"""Do the statements after a block loop map each token by itself?

In a real forward of the model every such statement runs again on some of the tokens: on
halves, on one, on none, in another order and on all of them twice.  What it makes of them
must be the same tokens of what it makes of all.  Then a rank can run it on its own tokens,
and what it makes is gathered in place of what it takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import CodeType
from typing import Any

import libcst as cst
import torch
from torch import nn

from porter.analysis.block_loops import BlockLoop
from porter.analysis.facts import LoopFacts, Tail
from porter.analysis.tail import read_after, tail_statements
from porter.parsed import ParsedModule
from porter.probe.capture import TransformerCall, copied
from porter.probe.cuts import same
from porter.probe.instrument import Probes, instrumented_forward
from porter.scope import writes


def measure_tail(
    model: nn.Module,
    source: ParsedModule,
    forward: cst.FunctionDef,
    loop: BlockLoop,
    facts: LoopFacts,
    calls: Sequence[TransformerCall],
) -> Tail | None:
    """The longest tail of the last loop that every call shows to be token by token.

    None where the latents' stream has no such tail, or where later code reads it besides.

    Args:
        model: the shrunken stock model.
        source: the module that defines its class.
        forward: its `forward`.
        loop: the last loop that becomes a region.
        facts: what was measured of it.
        calls: of several sizes.
    """
    stream, dim = facts.latents, _dim(facts)
    if stream is None or dim is None:
        return None
    statements = tail_statements(source, forward, loop, stream)
    if not statements:
        return None
    written = [frozenset(writes(source, statement)) for statement in statements]
    codes = [compile(source.source(part), source.file, "exec") for part in statements]
    held: list[frozenset[str]] | None = None
    for call in calls:
        run = _TailRun(stream, dim, codes, written)
        probes = Probes(lambda *_: None, tail=run.report)
        function = instrumented_forward(
            source, forward, (), model, probes, tail=statements
        )
        with torch.no_grad():
            function(**copied(call.arguments))
        held = run.held if held is None else _agreed(held, run.held)
    for index in range(len(held or ()) - 1, -1, -1):
        assert held is not None
        alive = read_after(source, forward, statements[index]) & held[index]
        if len(alive) == 1 and alive <= written[index]:
            texts = tuple(source.source(part) for part in statements[: index + 1])
            return Tail(stream, texts, next(iter(alive)))
    return None


def _dim(facts: LoopFacts) -> int | None:
    """The dimension of the tokens in the latents' stream, where it is one bare tensor."""
    axes = facts.values.get(facts.latents or "", ())
    if len(axes) != 1 or facts.latents in facts.travels:
        return None
    axis = axes[0]
    plain = axis.item is None and axis.keys is None
    return axis.dim if plain and not (axis.optional or axis.repeated) else None


def _agreed(
    one: Sequence[frozenset[str]], other: Sequence[frozenset[str]]
) -> list[frozenset[str]]:
    """What two calls show alike, from the first statement on."""
    found = []
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        found.append(mine)
    return found


class _TailRun:
    """Runs the statements of a tail on some of the tokens, beside a real forward.

    Args:
        stream: the name that holds the tokens before the first of them.
        dim: the dimension that counts them.
        codes: the statements.
        written: the names that each of them binds.

    Attributes:
        held: the names that hold tokens after each statement, of those that map each token
            by itself.
    """

    def __init__(
        self,
        stream: str,
        dim: int,
        codes: Sequence[CodeType],
        written: Sequence[frozenset[str]],
    ) -> None:
        self._dim = dim
        self._codes = codes
        self._written = written
        self._stream = stream
        self._tokens: list[torch.Tensor] = []
        # By choice of tokens: what the names hold that hold tokens, then what was made.
        self._parts: list[dict[str, Any]] = []
        self._made: list[dict[str, Any]] = []
        self.held: list[frozenset[str]] = []

    def report(
        self, index: int, names: Mapping[str, Any], scope: dict[str, Any]
    ) -> None:
        """Called before each statement and after the last.

        Args:
            index: of the statement that comes next.
            names: the real forward's locals.
            scope: its module's names.
        """
        if index == 0:
            self._begin(names[self._stream])
        elif len(self.held) == index - 1 and self._made:
            self._judge(self._written[index - 1], names)
        self._made = []
        if index < len(self._codes) and len(self.held) == index and self._parts:
            self._run(index, names, scope)

    def _begin(self, whole: Any) -> None:
        if not isinstance(whole, torch.Tensor) or whole.shape[self._dim] < 2:
            return
        self._tokens = _choices(whole.shape[self._dim])
        self._parts = [{self._stream: self._part(whole, t)} for t in self._tokens]

    def _run(self, index: int, names: Mapping[str, Any], scope: dict[str, Any]) -> None:
        for part in self._parts:
            # One frame, so that what a comprehension reads is found.
            frame = {**scope, **names, **part}
            try:
                exec(self._codes[index], frame)
            except Exception:  # whatever a statement does with other tokens than all
                self._made = []
                return
            self._made.append({name: frame[name] for name in self._written[index]})

    def _judge(self, written: frozenset[str], names: Mapping[str, Any]) -> None:
        """Keep the statement where each name that it binds holds tokens or does not."""
        whole = {name for name in written if self._is_whole(name, names[name])}
        if not all(self._is_token_by_token(n, names[n]) for n in written - whole):
            return
        for part, made in zip(self._parts, self._made, strict=True):
            part.update({name: made[name] for name in written - whole})
            for name in whole:
                part.pop(name, None)
        self.held.append(frozenset(self._parts[0]))

    def _is_whole(self, name: str, real: Any) -> bool:
        """Whether a name holds the same whatever the tokens are."""
        for made in self._made:
            value = made[name]
            if isinstance(real, torch.Tensor) and isinstance(value, torch.Tensor):
                if not same(real, value):
                    return False
            elif (
                type(value) is not type(real)
                or not isinstance(real, _PLAIN)
                or value != real
            ):
                return False
        return True

    def _is_token_by_token(self, name: str, real: Any) -> bool:
        """Whether a name holds what was made of the chosen tokens, each by itself."""
        if not isinstance(real, torch.Tensor) or real.ndim <= self._dim:
            return False
        if real.shape[self._dim] != len(self._tokens[0]):
            return False
        return all(
            isinstance(made[name], torch.Tensor)
            and same(self._part(real, tokens), made[name])
            for tokens, made in zip(self._tokens, self._made, strict=True)
        )

    def _part(self, whole: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return whole.index_select(self._dim, tokens)


_PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.Size, type(None))


def _choices(count: int) -> list[torch.Tensor]:
    """Tokens to run on; the first choice has all of them, in another order.

    A slice that takes all of the tokens shows where there are more, what drops dimensions of
    one where there is one.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    half, every = count // 2, torch.arange(count)
    return [
        order,
        every[:half],
        every[half:],
        every[-1:],
        every[:0],
        torch.cat([order, every]),
    ]
