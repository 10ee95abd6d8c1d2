"""One copy of a scheduler's state for each patch.

The copies are attribute dictionaries of the one scheduler object; the dictionary of the
patch at work is in place, the others are stored here.  So a pipeline that reads or writes
an attribute of its scheduler (`_step_index -= 1`, say) works on the copy of its patch.

Each copy steps whole tensors, of which only the patch's rows count: schedulers work
element by element, so their history, masks and noise need no cutting, and the numbers are
those of the whole step bit for bit.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from xfuser_runtime.schedulers.draws import StepDraws
from xfuser_runtime.schedulers.trees import Region, merge

#: Key of the `PatchCopies` in the attributes of a wrapped scheduler.
COPIES = "_xfuser_patch_copies"

#: Steps whose independence of other rows is measured; more than any multistep order.
CHECKED_STEPS = 4


class PatchCopies:
    """The copies of one scheduler, and what its step calls share.

    Attributes:
        active: patch whose attributes are in place; None for the whole latents.
        busy: a step runs now, so the active copy must stay.
        regions: rows of each patch that has stepped.
        outputs: for each step call of a pass, the whole tensors that it last returned.
        draws: noise of the current step.
        arguments: for each step call of a pass, what the first patch passed.
        checked: steps measured so far, by step function and patch.
    """

    def __init__(self) -> None:
        self.active: int | None = None
        self.busy = False
        self.regions: dict[int, Region] = {}
        self.outputs: dict[int, list[Any]] = {}
        self.draws = StepDraws()
        self.arguments: dict[int, list[Any]] = {}
        self.checked: dict[tuple[str, int], int] = {}
        self._stored: dict[int | None, dict[str, Any]] = {}
        self._pass: tuple[int, int | None] | None = None
        self._call = -1

    def next_call(self, step: int, patch: int | None) -> int:
        """Which step call of this pass begins now: 0, 1, ..."""
        if self._pass != (step, patch):
            self._pass, self._call = (step, patch), -1
        self._call += 1
        return self._call

    def activate(self, scheduler: object, patch: int | None) -> None:
        """Put the attributes of `patch` in place; a first patch pass makes its copy."""
        attributes = object.__getattribute__(scheduler, "__dict__")
        if patch is None:
            self.join(scheduler)
            return
        self._stored[self.active] = attributes
        if patch not in self._stored:
            self._stored[patch] = copied_attributes(self._stored[None])
            self._stored[patch][COPIES] = self
        _put(scheduler, self._stored[patch])
        self.active = patch

    def join(self, scheduler: object) -> None:
        """Make one whole state of the copies, as the whole steps would have left it."""
        if self.active is None:
            return
        self._stored[self.active] = object.__getattribute__(scheduler, "__dict__")
        stepped = sorted(self.regions) or [self.active]
        states = [without_copies(self._stored[patch]) for patch in stepped]
        regions = [self.regions[patch] for patch in stepped if patch in self.regions]
        covered = bool(regions) and sum(r.stop - r.start for r in regions) == (
            regions[0].extent
        )
        joined: dict[str, Any] = merge(states, regions) if covered else states[-1]
        joined[COPIES] = self
        _put(scheduler, joined)
        self.active = None
        self._stored.clear()
        self.regions.clear()

    def forget_call(self) -> None:
        """A new schedule begins: nothing of the last one is shared any more."""
        self.outputs.clear()
        self.draws.clear()
        self.arguments.clear()
        self._pass = None


def without_copies(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes of the scheduler itself."""
    return {name: value for name, value in attributes.items() if name != COPIES}


def copied_attributes(attributes: dict[str, Any]) -> dict[str, Any]:
    """A deep copy of a scheduler's own attributes.

    Tensors that are no leaves of autograd are detached, which `deepcopy` would refuse.
    Callables (noise samplers, which cannot all be copied) are shared: what they return
    depends on what they are asked, and the measurement of the first steps asks twice.
    """
    own = without_copies(attributes)
    memo: dict[int, Any] = {
        id(value): value for value in own.values() if callable(value)
    }
    for value in own.values():
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, torch.Tensor) and not item.is_leaf:
                memo[id(item)] = item.detach().clone()
    return copy.deepcopy(own, memo)


def _put(scheduler: object, attributes: dict[str, Any]) -> None:
    object.__setattr__(scheduler, "__dict__", attributes)
