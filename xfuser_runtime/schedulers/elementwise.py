"""Is a step exact when made patch by patch?  Asked of the config, then measured.

The measurement makes the step again on a copy whose inputs and history are changed in all
rows outside the patch.  If one bit inside differs, the step looks at other rows, so no
patch can be stepped on its own.
"""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from xfuser_runtime.base_wrapper import upstream_class
from xfuser_runtime.errors import NotSupportedError
from xfuser_runtime.schedulers.copies import (
    COPIES,
    PatchCopies,
    copied_attributes,
    without_copies,
)
from xfuser_runtime.schedulers.trees import (
    Region,
    map_tensors,
    outputs_of,
    same_in_region,
)


def not_supported(scheduler: object, found: str) -> NotSupportedError:
    """The manual's error for a scheduler that cannot step patches."""
    name = upstream_class(type(scheduler)).__name__
    return NotSupportedError(
        f"Scheduler {name} is not supported by xFuser: {found}; use "
        "num_pipeline_patch=1, warmup_steps of at least the number of inference steps, "
        "or another scheduler"
    )


def refuse_config(scheduler: Any) -> None:
    """Refuse settings that make a step look at the whole sample.

    Raises:
        NotSupportedError: for dynamic thresholding, which ranks the values of the whole
            sample.
    """
    if scheduler.config.get("thresholding", False):
        raise not_supported(
            scheduler,
            "thresholding=True takes a quantile of the whole sample, expected a step "
            "that works element by element to step patches",
        )


# Far from the original, of both signs and not the same for all rows; then close to zero.
# One alone can go unseen: a threshold that is clipped answers the same to all large values.
_DISTURBANCES: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda tensor: tensor * -3 + 7,
    lambda tensor: tensor * 0.01,
)


class ElementwiseCheck:
    """Measures whether one step call of one patch depends on other rows.

    Make it before the step, when inputs and history are still those of the step.

    Args:
        scheduler: the wrapped scheduler, with the patch's copy in place.
        upstream: the `step` function.
        region: rows of the patch.
        bound: arguments of the step, `self` included.
    """

    def __init__(
        self,
        scheduler: Any,
        upstream: Callable[..., Any],
        region: Region,
        bound: inspect.BoundArguments,
    ) -> None:
        self._scheduler = scheduler
        self._upstream = upstream
        self._region = region
        self._signature = bound.signature
        self._twins = [
            (
                self._twin(disturbance),
                map_tensors(dict(bound.arguments), self._outside(disturbance)),
            )
            for disturbance in _DISTURBANCES
        ]

    def runs(self) -> list[Callable[[], Any]]:
        """The same step on each twin: functions that return (what it returned, the twin)."""

        def run(twin: Any, arguments: dict[str, Any]) -> tuple[Any, Any]:
            call = inspect.BoundArguments(self._signature, OrderedDict(arguments))
            return self._upstream(twin, *call.args[1:], **call.kwargs), twin

        return [functools.partial(run, *twin) for twin in self._twins]

    def compare(self, result: Any, twin_result: Any, twin: Any) -> None:
        """Compare the patch's rows of what the step and its twin returned and keep.

        Raises:
            NotSupportedError: when they differ (the manual's message).
        """
        same = same_in_region(
            [outputs_of(result), without_copies(vars(self._scheduler))],
            [outputs_of(twin_result), without_copies(vars(twin))],
            self._region,
        )
        if not same:
            raise not_supported(
                self._scheduler,
                "the step of a patch changes with rows outside of it, expected a step "
                "that works element by element to step patches",
            )

    def _outside(
        self, disturbance: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        def disturbed(tensor: torch.Tensor) -> torch.Tensor:
            if not self._region.cuts(tensor) or not tensor.is_floating_point():
                return tensor
            return self._region.written(disturbance(tensor), tensor)

        return disturbed

    def _twin(self, disturbance: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        twin = object.__new__(type(self._scheduler))
        attributes = copied_attributes(vars(self._scheduler))
        vars(twin).update(map_tensors(attributes, self._outside(disturbance)))
        vars(twin)[COPIES] = PatchCopies()
        vars(twin)[COPIES].busy = True
        return twin
