"""Callbacks that verified calls use.

Both the stock run and the ranks load this file by its path, so it imports nothing of
porter.  Each makes a callable that serves `callback_on_step_end(pipe, i, t, kwargs)` and the
older `callback(i, t, latents)` alike, and counts how often it was called.
"""

from __future__ import annotations

from typing import Any


class ChangeLatents:
    """Pull each sample's latents towards their mean once, at one step.

    The change depends on the whole sample, so a rank that holds part of it is found out.
    """

    tensor_inputs = ["latents"]

    def __init__(self, step: int = 3) -> None:
        self.step = step
        self.calls: list[int] = []

    def __call__(self, *args: Any) -> dict[str, Any]:
        step, latents = _step_and_latents(args)
        self.calls.append(step)
        if step == self.step:
            mean = latents.mean(dim=tuple(range(1, latents.dim())), keepdim=True)
            # In place: the older form of callback cannot return latents.
            latents = latents.mul_(0.8).add_(0.2 * mean)
        return {"latents": latents}


class Interrupt:
    """Set the pipeline's `_interrupt` at one step: the loop skips all later steps."""

    tensor_inputs = ["latents"]

    def __init__(self, step: int = 4) -> None:
        self.step = step
        self.calls: list[int] = []

    def __call__(
        self, pipe: Any, step: int, t: Any, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        self.calls.append(step)
        if step == self.step:
            pipe._interrupt = True
        return {}


def _step_and_latents(args: tuple[Any, ...]) -> tuple[int, Any]:
    if len(args) == 4:
        return args[1], args[3]["latents"]
    return args[0], args[2]
