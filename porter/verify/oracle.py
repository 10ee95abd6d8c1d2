"""PipeFusion's oracle: displaced patches simulated in one process on the stock pipeline.

It imports nothing of the runtime and nothing of the ports.  Stock modules compute, hooks
decide what each attention call may see.  What it states about displacement:

Order.  With P stages, patch p of step i enters a stage after patches 0..p-1 of step i have
passed that stage, whatever P is.  So when any block computes patch p at step i, its
attention reads rows of patches < p from step i, its own from step i, and rows of patches
> p from step i-1.  The number of stages does not show in the result.

Return.  The latent rows of patch p leave the last stage and reach stage 0 before patch p
of step i+1 starts there, and not earlier: code before the blocks sees, at (i, p), rows
<= p of x_i and rows > p of x_(i-1).  After a whole (warm-up) step, after a step with a
callback, and where another model reads the latents, stage 0 has all rows.

Text.  Rows of keys that follow no latents are shared out too: each run of them is cut into
even pieces, one a patch.  Attention whose keys hold no row that follows the latents stays
plain.

Start.  Warm-up steps run whole and fill the caches.  With no warm-up, attention sees the
rows filled so far alone.

Body.  What the loop does to the latents before and after scheduler.step (an inpainting
pipeline puts the known rows back) belongs to the pass: it counts for the rows of its patch,
and for no others.  The scheduler may step a slice of the latents that has all of their rows.

Schedulers.  Each patch steps its rows by its own copy, made after the warm-up.  The noise
of a step is drawn whole and alike by all patches.  What `step` returns besides the sample
may be handed back to it in the next step: its rows, too, are those that each patch made.

How.  A block computes each token from its own row and from its attention, so the blocks may
compute *all* rows in each pass as long as attention keeps the displaced keys: the rows of
other patches are thrown away.  That needs no knowledge of the model beyond which key rows
follow which latent rows, and `geometry` measures those.  The loop's body runs in its own
frame, once a pass: `enumerate`, as the pipeline's module sees it, hands out the passes, or
the progress bar where the loop goes through it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from porter.verify.branches import branches_apart
from porter.verify.floor import output_tensors, seeded
from porter.verify.geometry import OracleRefusal
from porter.verify.hooks import install_step, replaced_global, replaced_step
from porter.verify.loop_frame import LoopFrame
from porter.verify.stale_keys import StaleKeys

_CALLBACKS = ("callback", "callback_on_step_end")


@dataclass(frozen=True)
class DisplacedPatches:
    """What to simulate.

    Attributes:
        num_patches: patches of the latents.
        warmup_steps: steps that run whole before.
        regions: names of the block lists that the port cuts into patches; attention
            outside them runs whole.  None: all attention that sees the latents.
        branches: the doubled axes of a guided call, by path, where CFG ranks compute its
            branches apart and that shows; see `porter.verify.branches`.
        whole_steps: every step begins with all rows of the step before, because another
            model reads them; that model runs whole.
    """

    num_patches: int
    warmup_steps: int
    regions: tuple[str, ...] | None = None
    branches: tuple[tuple[str, int | str], ...] = ()
    whole_steps: bool = False

    def run(
        self, pipeline: Any, call: Callable[[], Mapping[str, Any]], batch: int = 1
    ) -> tuple[torch.Tensor, ...]:
        """The latents that PipeFusion should return for this call, one tensor an output.

        Args:
            pipeline: the stock pipeline.
            call: makes fresh keyword arguments.
            batch: number of pictures that the call makes.

        Raises:
            OracleRefusal: the pipeline's loop has a shape that the oracle cannot follow.
        """
        with seeded(), branches_apart(pipeline, dict(self.branches), batch):
            return _Simulation(self, pipeline, dict(call())).run()


@dataclass
class _Latents:
    """The loop's variable: its rows as the last stage made them and as stage 0 sees them."""

    newest: torch.Tensor
    seen: torch.Tensor


class _Simulation:
    """One run. The pass that is running is `(step, patch)`; patch None is a whole pass."""

    def __init__(
        self, plan: DisplacedPatches, pipeline: Any, call: dict[str, Any]
    ) -> None:
        self._plan = plan
        self._pipeline = pipeline
        self._call = call
        self._callback_names = [n for n in _CALLBACKS if call.get(n) is not None]
        self._step, self._last_step = 0, 0
        self._patch: int | None = None
        self._in_pass = False
        self._steps_in_pass = 0
        self._frame = LoopFrame(inspect.unwrap(type(pipeline).__call__))
        self._keys = StaleKeys(
            pipeline,
            num_patches=plan.num_patches,
            has_warmup=plan.warmup_steps > 0,
            regions=plan.regions,
            sample=self._frame.latents,
        )
        self._latents: _Latents | None = None
        self._stepped = torch.empty(0)
        self._others: list[Any] = []
        self._main = pipeline.scheduler
        self._copies: list[Any] = []
        self._random: list[torch.Tensor] = []

    def run(self) -> tuple[torch.Tensor, ...]:
        pipeline = self._pipeline
        code = inspect.unwrap(type(pipeline).__call__)
        for name in self._callback_names:
            self._call[name] = self._once_a_step(self._call[name])
        with contextlib.ExitStack() as stack:
            stack.callback(vars(pipeline).__setitem__, "scheduler", self._main)
            stack.enter_context(
                replaced_global(code.__globals__, "enumerate", self._enumerate)
            )
            stack.callback(vars(pipeline).pop, "progress_bar", None)
            vars(pipeline)["progress_bar"] = self._progress_bar
            stack.enter_context(replaced_step(self._main, self._scheduler_step))
            stack.enter_context(self._keys.watching())
            outputs = output_tensors(pipeline(**self._call))
        if not self._keys.is_probed:
            raise OracleRefusal(
                f"{type(pipeline).__name__} never looped over its timesteps, "
                "expected that loop around its denoiser"
            )
        return outputs

    # The loop.

    def _enumerate(self, values: Iterable[Any], start: int = 0) -> Iterator[Any]:
        if not self._is_timesteps(values):
            return enumerate(values, start)
        return self._passes(values, start)

    def _progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        """As upstream's; some pipelines loop over their timesteps through it."""
        if iterable is not None and self._is_timesteps(iterable):
            return (t for _, t in self._passes(iterable, 0))
        return type(self._pipeline).progress_bar(self._pipeline, iterable, total)

    def _is_timesteps(self, values: Iterable[Any]) -> bool:
        timesteps: Any = getattr(self._pipeline.scheduler, "timesteps", None)
        if values is timesteps:
            return True
        if not isinstance(timesteps, torch.Tensor):
            return False
        if not isinstance(values, torch.Tensor) or not len(values):
            return False
        # A pipeline that starts from an image loops over the last steps alone.
        return bool(torch.equal(values, timesteps[-len(values) :]))

    def _passes(self, timesteps: Iterable[Any], start: int) -> Iterator[Any]:
        """Yield `(i, t)` once a pass: whole in the warm-up, then once a patch."""
        times = list(timesteps)
        self._last_step = len(times) - 1
        # A loop that stands in another one runs several times, each time anew.
        held = self._frame.latents()
        self._latents = None if held is None else _Latents(held.clone(), held.clone())
        self._copies, self._others = [], []
        self._keys.begin_loop()
        for step, t in enumerate(times):
            if step < self._plan.warmup_steps:
                patches: Iterable[int | None] = (None,)
            else:
                patches = range(self._plan.num_patches)
            for patch in patches:
                self._begin(step, patch)
                yield start + step, t
                self._in_pass = False
                self._end_pass()
                self._keys.end_pass()
        vars(self._pipeline)["scheduler"] = self._main

    def _begin(self, step: int, patch: int | None) -> None:
        self._step, self._patch, self._in_pass = step, patch, True
        self._steps_in_pass = 0
        self._keys.begin_pass(step, patch)
        if patch is None:
            return
        if not self._copies:
            self._copies = [self._copy() for _ in range(self._plan.num_patches)]
        vars(self._pipeline)["scheduler"] = self._copies[patch]
        if patch == 0:
            self._random = self._random_states()
        else:
            self._restore_random()

    def _once_a_step(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        """The user's callback, silent in all but the last pass of a step."""

        @functools.wraps(callback)
        def call(*args: Any, **kwargs: Any) -> Any:
            return callback(*args, **kwargs) if self._is_last_pass() else {}

        return call

    def _is_last_pass(self) -> bool:
        return self._patch is None or self._patch == self._plan.num_patches - 1

    # The scheduler.

    def _copy(self) -> Any:
        """A copy of the scheduler as the warm-up left it, stepping through this object."""
        vars(self._main).pop("step")
        copied = copy.deepcopy(self._main)
        install_step(self._main, self._scheduler_step)
        install_step(copied, self._scheduler_step)
        return copied

    def _scheduler_step(
        self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Step the rows of the running pass; return latents as stage 0 sees them next."""
        if not self._in_pass:
            return step(*args, **kwargs)
        sample = inspect.signature(step).bind(*args, **kwargs).arguments["sample"]
        self._count_step()
        result = step(*args, **kwargs)
        stepped = result[0]
        outputs = list(result[1:]) if isinstance(result, tuple) else []
        if self._patch is None:
            self._others = outputs
            return result
        self._stepped = self._with_patch(
            self._stepped if self._patch else stepped, stepped, self._patch
        )
        # Where the step ends whole, the body goes on with what all patches stepped.
        held = self._stepped if self._step_ends_whole() else sample
        self._others = self._merged(outputs, sample.shape, self._patch)
        return _with_sample(
            result, self._with_patch(held, stepped, self._patch), self._others
        )

    def _end_pass(self) -> None:
        """Give the loop the latents that stage 0 sees in the next pass.

        Raises:
            OracleRefusal: no variable of the loop holds the latents.
        """
        latents, held = self._latents, self._frame.latents()
        if not self._steps_in_pass:
            return
        if latents is None or held is None or held.shape != latents.seen.shape:
            raise OracleRefusal(
                "no variable of the loop holds the latents that scheduler.step takes, "
                "expected one that is carried from step to step"
            )
        patch = self._patch
        if patch is None or self._step_ends_whole():
            self._latents = _Latents(held.clone(), held.clone())
            return
        latents.newest = self._with_patch(latents.newest, held, patch)
        following = 0 if self._is_last_pass() else patch + 1
        latents.seen = self._with_patch(latents.seen, latents.newest, following)
        # The body goes on with this very tensor.
        held.copy_(latents.seen)

    def _step_ends_whole(self) -> bool:
        """Whether stage 0 gets all rows after this pass: the last one, for a callback, or
        for another model."""
        is_whole = (
            self._step == self._last_step
            or bool(self._callback_names)
            or self._plan.whole_steps
        )
        return self._is_last_pass() and is_whole

    def _with_patch(
        self, whole: torch.Tensor, source: torch.Tensor, patch: int
    ) -> torch.Tensor:
        """`whole` with the rows of `patch` from `source`."""
        return _with_rows(
            whole, source, self._keys.rows.axis, self._regions(whole)[patch]
        )

    def _merged(self, others: list[Any], shape: torch.Size, patch: int) -> list[Any]:
        """Further outputs of `step`, each row as its own patch made it last."""
        before = self._others if len(self._others) == len(others) else others
        return [
            (
                self._with_patch(old, new, patch)
                if isinstance(new, torch.Tensor) and new.shape == shape
                else new
            )
            for old, new in zip(before, others, strict=True)
        ]

    def _count_step(self) -> None:
        """Accept a step of the loop's body.

        Raises:
            OracleRefusal: it is not the only one of the pass.
        """
        self._steps_in_pass += 1
        if self._steps_in_pass > 1:
            raise OracleRefusal("scheduler.step runs twice in a step, expected once")

    def _regions(self, sample: torch.Tensor) -> tuple[tuple[int, int], ...]:
        axis, regions = self._keys.rows.axis, self._keys.regions
        if sample.dim() < -axis or sample.shape[axis] != regions[-1][1]:
            raise OracleRefusal(
                f"the scheduler steps {tuple(sample.shape)}, expected "
                f"{regions[-1][1]} rows on axis {axis} as the denoiser's latents have"
            )
        return regions

    # Random numbers: all patches of a step draw the same whole tensors.

    def _generators(self) -> list[torch.Generator]:
        found = self._call.get("generator")
        if found is None:
            return []
        return list(found) if isinstance(found, (list, tuple)) else [found]

    def _random_states(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(g.get_state() for g in self._generators())]

    def _restore_random(self) -> None:
        torch.set_rng_state(self._random[0])
        for generator, state in zip(self._generators(), self._random[1:], strict=True):
            generator.set_state(state)


def _with_rows(
    whole: torch.Tensor, source: torch.Tensor, axis: int, region: tuple[int, int]
) -> torch.Tensor:
    """`whole` with the rows of `region` from `source`."""
    start, stop = region
    changed = whole.clone()
    changed.narrow(axis, start, stop - start).copy_(
        source.narrow(axis, start, stop - start)
    )
    return changed


def _with_sample(result: Any, sample: torch.Tensor, others: list[Any]) -> Any:
    """A scheduler's result, tuple or output object, with another `prev_sample`."""
    if isinstance(result, tuple):
        return (sample, *others)
    changed = copy.copy(result)
    changed.prev_sample = sample
    return changed
