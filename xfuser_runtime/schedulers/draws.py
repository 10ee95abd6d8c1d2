"""The noise of one step, drawn once and given to every patch.

The first patch of a step draws for the whole latents, as the whole step would; the other
patches are given the same numbers.  So the bits equal those of the whole step, and the
generators end where the whole step leaves them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from xfuser_runtime.randomness import Draw, intercept_draws, random_states

T = TypeVar("T")


class UnrepeatableDraw(Exception):
    """A step drew numbers in a way that cannot be repeated for another patch."""


class StepDraws:
    """What each `step` call of the current step drew, in order."""

    def __init__(self) -> None:
        self._calls: dict[int, list[tuple[str, torch.Tensor]]] = {}

    def clear(self) -> None:
        """Forget all draws."""
        self._calls.clear()

    def record(
        self, call: int, run: Callable[[], T], generators: Sequence[torch.Generator]
    ) -> T:
        """Run a step call of the first patch and keep what it draws.

        Args:
            call: which step call of the pass this is.
            run: the step.
            generators: the user's generators; those that the scheduler made for itself
                are copied with it and need no help.
        """
        if call == 0:
            self.clear()
        drawn = self._calls[call] = []

        def keep(draw: Draw) -> torch.Tensor:
            result = draw()
            if _is_shared(draw, generators):
                drawn.append((draw.name, result.clone()))
            return result

        with intercept_draws(keep):
            return run()

    def replay(
        self, call: int, run: Callable[[], T], generators: Sequence[torch.Generator]
    ) -> T:
        """Run the same step call of another patch on the same numbers.

        Raises:
            UnrepeatableDraw: when it draws more, fewer or other numbers than the first
                patch did, or past the functions of torch that are watched.
        """
        if call not in self._calls:
            raise UnrepeatableDraw("a step call that the first patch did not make")
        waiting: Iterator[tuple[str, torch.Tensor]] = iter(self._calls[call])

        def give(draw: Draw) -> torch.Tensor:
            if not _is_shared(draw, generators):
                return draw()
            name, numbers = next(waiting, (None, None))
            if name != draw.name or numbers is None:
                raise UnrepeatableDraw(f"torch.{draw.name}, unlike the first patch")
            return draw.args[0].copy_(numbers) if draw.in_place else numbers.clone()

        before = random_states(generators)
        with intercept_draws(give):
            result = run()
        after = random_states(generators)
        if next(waiting, None) is not None:
            raise UnrepeatableDraw("fewer random numbers than the first patch")
        if not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
            raise UnrepeatableDraw("random numbers past torch's drawing functions")
        return result


def _is_shared(draw: Draw, generators: Sequence[torch.Generator]) -> bool:
    return draw.generator is None or any(draw.generator is g for g in generators)
