"""One call of a scheduler's `step`, on whole latents or on one patch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from xfuser_runtime.distributed.parallel_state import is_pipeline_last_stage
from xfuser_runtime.distributed.runtime_state import RuntimeState
from xfuser_runtime.errors import InputError
from xfuser_runtime.randomness import find_generators
from xfuser_runtime.schedulers.copies import CHECKED_STEPS, PatchCopies
from xfuser_runtime.schedulers.draws import UnrepeatableDraw
from xfuser_runtime.schedulers.elementwise import (
    ElementwiseCheck,
    not_supported,
    refuse_config,
)
from xfuser_runtime.schedulers.trees import (
    Region,
    map_tensors,
    outputs_of,
    with_outputs,
)


class StepCall:
    """A call of `step` under the runtime state of its pass.

    Args:
        scheduler: the wrapped scheduler, with the copy of this pass in place.
        upstream: its `step` function that this call goes to.
        bound: the arguments, `self` included.
        copies: its copies.
        state: runtime state.
    """

    def __init__(
        self,
        scheduler: Any,
        upstream: Callable[..., Any],
        bound: inspect.BoundArguments,
        copies: PatchCopies,
        state: RuntimeState,
    ) -> None:
        self._scheduler = scheduler
        self._upstream = upstream
        self._copies = copies
        self._state = state
        self._bound = bound
        self._call = copies.next_call(state.step, state.patch)

    def run(self) -> Any:
        """What `step` returns, in upstream's form."""
        if self._state.num_patches > 1:
            refuse_config(self._scheduler)
        if self._state.patch is None:
            result = self._run_upstream()
            if self._state.num_patches > 1:
                self._copies.outputs[self._call] = outputs_of(result)
        else:
            result = self._run_patch(self._state.patch)
        if is_pipeline_last_stage():
            return result
        # Another stage computes the sample; this one goes on with what it received.
        new, *others = outputs_of(result)
        return with_outputs(result, [self._sample().to(new.dtype), *others])

    def _run_upstream(self) -> Any:
        self._copies.busy = True
        try:
            return self._upstream(*self._bound.args, **self._bound.kwargs)
        except RuntimeError:
            self._explain_shapes()
            raise
        finally:
            self._copies.busy = False

    def _explain_shapes(self) -> None:
        """Say in one line that the latents are no whole number of the model's patches.

        Only once upstream's step failed: for some, the two differ by right.
        """
        output = self._bound.arguments.get("model_output")
        sample = self._bound.arguments.get("sample")
        if not isinstance(output, torch.Tensor) or not isinstance(sample, torch.Tensor):
            return
        found, expected = output.shape[2:], sample.shape[2:]
        if sample.ndim > 3 and 1 not in (*found, *expected) and found != expected:
            raise InputError(
                f"a model output of {_by(found)} for latents of {_by(expected)}, expected "
                "the same size; choose a height and a width that the patches divide"
            )

    def _run_patch(self, patch: int) -> Any:
        copies, region = self._copies, self._region()
        self._compare_arguments(patch)
        check = self._check(patch, region)
        # History may keep its inputs, and the pipeline may write into them later.
        own = map_tensors(
            dict(self._bound.arguments), lambda t: t.clone() if region.cuts(t) else t
        )
        self._bound.arguments.update(own)
        generators = find_generators(own)
        draw = copies.draws.record if patch == 0 else copies.draws.replay
        try:
            result = draw(self._call, self._run_upstream, generators)
            if check is not None:
                for run_twin in check.runs():
                    twin = copies.draws.replay(self._call, run_twin, generators)
                    check.compare(result, *twin)
        except UnrepeatableDraw as error:
            raise not_supported(
                self._scheduler,
                f"the step of patch {patch} draws {error}, expected the draws of the "
                "whole step",
            ) from error
        copies.regions[patch] = region
        return with_outputs(result, self._whole_outputs(outputs_of(result), region))

    def _check(self, patch: int, region: Region) -> ElementwiseCheck | None:
        """Measure the first steps of each patch, by each step function."""
        key = (self._upstream.__name__, patch)
        measured = self._copies.checked.get(key, 0)
        if region.is_whole or measured >= CHECKED_STEPS:
            return None
        self._copies.checked[key] = measured + 1
        return ElementwiseCheck(self._scheduler, self._upstream, region, self._bound)

    def _whole_outputs(self, outputs: list[Any], region: Region) -> list[Any]:
        """Whole tensors with this patch's rows new.

        The other rows of the new sample are those of the sample.  Those of further
        outputs are what their own patch returned last, since some pipelines hand such an
        output back in the next step.
        """
        if not region.cuts(outputs[0]):
            raise not_supported(
                self._scheduler,
                "step returned no sample of the latents' extent, expected one first",
            )
        if self._state.patch != self._state.num_patches - 1:
            # Patches to come start from this sample: its precision must last till then.
            wider = torch.promote_types(self._sample().dtype, outputs[0].dtype)
            outputs = [outputs[0].to(wider), *outputs[1:]]
        last = self._copies.outputs.get(self._call, [])
        if len(last) != len(outputs):
            last = outputs
        bases = [self._sample(), *last[1:]]
        whole = [
            (
                region.written(base if region.cuts(base) else new, new)
                if region.cuts(new)
                else new
            )
            for base, new in zip(bases, outputs, strict=True)
        ]
        self._copies.outputs[self._call] = whole
        return whole

    def _sample(self) -> torch.Tensor:
        sample = self._bound.arguments.get("sample")
        if not isinstance(sample, torch.Tensor) or not sample.is_floating_point():
            raise not_supported(
                self._scheduler,
                "no floating-point tensor `sample` was passed to step, expected one",
            )
        return sample

    def _region(self) -> Region:
        rows, latents = self._state.latent_slice, self._state.latents_shape
        assert rows is not None and latents is not None, "a patch pass has a region"
        sample = self._sample()
        region = Region(
            ndim=len(latents),
            extent=latents[rows.dim],
            dim=rows.dim,
            start=rows.start,
            stop=rows.stop,
        )
        output = self._bound.arguments.get("model_output")
        for name, tensor in (("sample", sample), ("model_output", output)):
            if not region.cuts(tensor):
                raise not_supported(
                    self._scheduler,
                    f"{name} of shape {tuple(getattr(tensor, 'shape', ()))} for latents "
                    f"of shape {latents}, expected the same extent along axis {rows.dim}",
                )
        return region

    def _compare_arguments(self, patch: int) -> None:
        """All patches of a step must be stepped alike.

        A pipeline that feeds an output of one pass into the next one's step would
        otherwise give the first patch of the first step another formula than the others.
        """
        kinds = [_kind(value) for value in list(self._bound.arguments.values())[1:]]
        if patch == 0:
            self._copies.arguments[self._call] = kinds
        elif self._copies.arguments.get(self._call) != kinds:
            raise not_supported(
                self._scheduler,
                f"step of patch {patch} was called with other arguments than that of "
                "patch 0, expected the same kinds and numbers",
            )


def _by(extents: torch.Size) -> str:
    return " x ".join(str(extent) for extent in extents)


def _kind(value: Any) -> Any:
    # What decides which way a step goes: None or not, numbers, shapes; not tensor values.
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, (list, tuple)):
        return [_kind(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return id(value)
