"""The base of all generated pipeline wrappers (manual, section 1).

Every rank runs the same `__call__` on whole latents.  The parallel work hides behind the
transformer call, `scheduler.step` and the iterator of the denoising loop, all of which are
here; the generated subclass holds the rewritten `__call__`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import nn

from xfuser_runtime.attention.backends import check_backend_name
from xfuser_runtime.base_wrapper import (
    swap_class,
    upstream_class,
    upstream_class_of_instance,
    xFuserBaseWrapper,
)
from xfuser_runtime.config import EngineConfig
from xfuser_runtime.distributed import parallel_state
from xfuser_runtime.distributed.collectives import all_reduce_max
from xfuser_runtime.distributed.launch import prepare_environment
from xfuser_runtime.distributed.runtime_state import get_runtime_state
from xfuser_runtime.encoders import share_encoders
from xfuser_runtime.errors import InputError
from xfuser_runtime.layers.attention import reset_kv_caches
from xfuser_runtime.pipelines import cfg, guiders
from xfuser_runtime.pipelines.components import (
    modules_of,
    parts_of,
    wrapped_transformers,
)
from xfuser_runtime.pipelines.data_parallel import enable_data_parallel
from xfuser_runtime.pipelines.denoising_loop import DenoisingLoop, Latents, Share
from xfuser_runtime.pipelines.loading import own_components
from xfuser_runtime.proofs import refuse_lacking, used_kinds
from xfuser_runtime.randomness import same_randomness
from xfuser_runtime.schedulers import wrap_scheduler
from xfuser_runtime.transformers import xFuserTransformerBaseWrapper
from xfuser_runtime.transformers.register import xFuserTransformerWrappersRegister

F = TypeVar("F", bound=Callable[..., Any])


class _WrapsPipelines(type):
    """`cls(pipeline, engine_config)` re-classes the pipeline instead of building one."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], DiffusionPipeline):
            return cls.wrap(*args, **kwargs)  # type: ignore[attr-defined]
        # diffusers builds pipelines from components (`from_pipe`, `from_pretrained`).
        pipeline = upstream_class(cls)(*args, **kwargs)
        return cls.wrap(  # type: ignore[attr-defined]
            pipeline, get_runtime_state().engine_config
        )


class xFuserPipelineBaseWrapper(xFuserBaseWrapper, metaclass=_WrapsPipelines):
    """A pipeline that runs in parallel and is the upstream pipeline in all else.

    Class attributes that the generated subclass sets:
        refused_modes: kind of splitting to the reason why the port lacks it. Without `pp`
            the denoising loop is as upstream wrote it.
    """

    refused_modes: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def wrap(
        cls, pipeline: DiffusionPipeline, engine_config: EngineConfig
    ) -> DiffusionPipeline:
        """Swap the class of `pipeline`; its whole `__dict__` stays as it is.

        Raises:
            ValueError: when the pipeline is of another class, a mode is not proven, no
                attention kernel has the name asked for, the degrees do not fit the world
                size, or encoders cannot be on one rank as asked for.
        """
        original = upstream_class(cls)
        if upstream_class_of_instance(pipeline) is not original:
            raise ValueError(
                f"a pipeline of class {type(pipeline).__name__}, expected "
                f"{original.__name__}; wrap it with the port of its own class"
            )
        cls.check_proven(engine_config)
        check_backend_name(engine_config.runtime_config.attention_backend)
        prepare_environment(engine_config)
        if engine_config.runtime_config.text_encoders_on_first_rank:
            share_encoders(modules_of(pipeline), original.model_cpu_offload_seq)
        swap_class(pipeline, cls)
        for name, part in parts_of(pipeline).items():
            if isinstance(part, nn.Module):
                pipeline._wrap_module(part)
            elif isinstance(part, SchedulerMixin):
                setattr(pipeline, name, part)
        return pipeline

    @classmethod
    def _own_components(
        cls, path: Any, engine_config: EngineConfig, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Options of `from_pretrained` with what this rank holds in part; see
        `loading.own_components`."""
        return own_components(upstream_class(cls), path, engine_config, options)

    @classmethod
    def check_proven(cls, engine_config: EngineConfig) -> None:
        """Refuse modes that the port lacks; the loader of ports puts a check in its place
        that also refuses what `porter verify` has not proven.

        Raises:
            NotSupportedError: a mode is lacking.
        """
        refuse_lacking(cls.__name__, cls.refused_modes, used_kinds(engine_config))

    @classmethod
    def _wrap_module(cls, module: nn.Module) -> None:
        # A compiled module or an adapter's model hold the transformer one level down.
        for inner in list(module.modules()):
            wrapper = xFuserTransformerWrappersRegister.find(type(inner))
            if wrapper is not None:
                wrapper.wrap(inner)  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        """Components assigned later are wrapped as well."""
        if isinstance(value, SchedulerMixin):
            value = wrap_scheduler(value)
        elif isinstance(value, nn.Module):
            self._wrap_module(value)
        super().__setattr__(name, value)

    # -- decorators of the generated __call__, in this order ---------------------------

    enable_data_parallel = staticmethod(enable_data_parallel)

    @staticmethod
    def check_to_use_naive_forward(function: F) -> F:
        """Run upstream's own `__call__` where only data parallelism is on (manual, 1).

        Otherwise all ranks of the replica are given the same random state, and the pass
        state is cleared whatever happens.
        """

        @functools.wraps(function)
        def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
            group = parallel_state.get_replica_group()
            if group.world_size == 1:
                return upstream_class(type(self)).__call__(self, *args, **kwargs)
            self._forget_last_call()
            state = get_runtime_state()
            if "pp" in self.refused_modes:
                state.begin_upstreams_loop()
            with same_randomness(group, args, kwargs):
                try:
                    output = function(self, *args, **kwargs)
                    if state.loop_is_upstreams:
                        _check_entered(state.step)
                    self._finish_sends()
                    return output if parallel_state.is_dp_last_group() else None
                finally:
                    self.__dict__.pop("_xfuser_loop", None)
                    self.__dict__.pop("_xfuser_share", None)
                    state.end_passes()

        return checked  # type: ignore[return-value]

    # -- what the generated __call__ calls ----------------------------------------------

    def _sync_pipeline(
        self, items: Iterable[Any], num_warmup_steps: int, *, callback: Any = None
    ) -> Iterator[Any]:
        """Whole passes over the warm-up steps; over all steps where there is one stage or
        no step is left after the warm-up (the manual's `sync_only`).

        A loop that stands in another one runs several times in a call, each time anew.
        """
        state = get_runtime_state()
        if "_xfuser_loop" in self.__dict__:
            self._finish_sends()
            self._forget_last_call()
            state.begin_loop()
        loop = DenoisingLoop(
            list(items),
            num_warmup_steps,
            state,
            has_callback=callback is not None,
            share=self.__dict__.get("_xfuser_share"),
        )
        self.__dict__["_xfuser_loop"] = loop
        yield from self._watched(loop.sync_steps())

    def _async_pipeline(self) -> Iterator[Any]:
        """One pass for each patch of each step that `_sync_pipeline` left (PipeFusion)."""
        yield from self._watched(self._loop.async_steps())

    def _share_latents(self, when: Share) -> None:
        """Every stage gets the whole latents at the end of each of the "steps", or of the
        "loop": something besides the transformer reads them there."""
        self.__dict__["_xfuser_share"] = when

    def _receive_patch(self, *latents: torch.Tensor | None) -> Any:
        """The latents this pass starts from; see `DenoisingLoop.receive`.

        Several come back as a tuple, one bare.  Latents that a call does without are None.
        """
        return _as_given(latents, self._loop.receive(*_held(latents)))

    def _commit_patch(self, before: Any, *latents: torch.Tensor | None) -> Any:
        """The latents after this pass; see `DenoisingLoop.commit`.

        Args:
            before: what `_receive_patch` returned.
            latents: as the body left them.

        Raises:
            RuntimeError: when no transformer call of the pass entered generated code (a
                hook installed before wrapping still calls upstream's forward, say).
        """
        _check_entered(get_runtime_state().call_index)
        held = _held(before if isinstance(before, tuple) else (before,))
        return _as_given(latents, self._loop.commit(held, _held(latents)))

    def _skip_patch(self, *latents: torch.Tensor | None) -> Any:
        """The latents after a pass that the loop leaves out: as they were received."""
        held = _held(latents)
        return _as_given(latents, self._loop.commit(held, held))

    def _step_is_complete(self) -> bool:
        """True in the last pass of a step: callbacks and the progress bar run once a step."""
        return self._loop.step_is_complete

    def _refuse_patches(self, formula: str) -> None:
        """Stop a call with patches before a formula over all rows of the latents.

        Raises:
            InputError: this call makes passes over patches.
        """
        if get_runtime_state().num_patches > 1:
            raise InputError(
                f"{formula} looks at all rows of the latents at once, expected a formula "
                "that keeps them apart; leave out the argument that asks for it, or use "
                "warmup_steps >= the number of steps"
            )

    def _process_cfg_split_batch(self, *negative_and_positive: Any) -> Any:
        """The guided batch, or this rank's half of it; see `cfg.split_batch`."""
        return cfg.split_batch(*negative_and_positive)

    def _restore_cfg_batch(self, *halves: Any) -> Any:
        """Both branches again, for a callback; see `cfg.restore_batch`."""
        return cfg.restore_batch(*halves)

    def _cfg_batched_call(
        self,
        transformer: Any,
        axes: Mapping[str, int | str],
        batch_size: int | None = None,
    ) -> Callable[..., Any]:
        """One transformer call for both branches; see `cfg.batched_call`.

        A loop that is upstream's passes the batch of its latents, one whose latents carry
        both branches half of it.
        """
        return cfg.batched_call(transformer, axes, _batch_of_latents(batch_size))

    def _cfg_helper_call(
        self,
        helper: Any,
        axes: Mapping[str, int | str],
        batch_size: int | None = None,
    ) -> Callable[..., Any]:
        """The call of a model that feeds the transformer; see `cfg.helper_call`."""
        return cfg.helper_call(helper, axes, _batch_of_latents(batch_size))

    def _cfg_branch_call(
        self, transformer: Any, branch: int, other_runs: bool
    ) -> Callable[..., Any]:
        """One of two sequential transformer calls; see `cfg.branch_call`."""
        return cfg.branch_call(transformer, branch, other_runs)

    def _cfg_exchange_branches(self, first: Any, second: Any) -> Any:
        """The outputs of both branches on both ranks; see `cfg.exchange_branches`."""
        return cfg.exchange_branches(first, second)

    def _cfg_entries(self, items: Iterable[Any], attribute: str) -> Iterator[Any]:
        """A guider's entries, each computed by one CFG rank; see `guiders.entries`."""
        yield from guiders.entries(items, attribute)

    def _cfg_entry_call(self, transformer: Any) -> Callable[..., Any]:
        """The transformer call for one entry; see `guiders.entry_call`."""
        return guiders.entry_call(transformer)

    def _check_guider(self, guider: Any) -> None:
        """Refuse a guider that does not split, once a call; see `guiders.check_guider`."""
        state = get_runtime_state()
        if state.step == 0:
            dim = state.patch_dim if state.num_patches > 1 else None
            guiders.check_guider(guider, state.num_steps, dim)

    @property
    def _loop(self) -> DenoisingLoop:
        loop: DenoisingLoop = self.__dict__["_xfuser_loop"]
        return loop

    def _finish_sends(self) -> None:
        """Wait until the other stages have what this one sent them: a message that is on
        its way is lost with the objects that hold it."""
        if "_xfuser_loop" in self.__dict__:
            self._loop.finish_sends()
        for transformer in self._wrapped_transformers():
            transformer.finish_sends()

    def _forget_last_call(self) -> None:
        """Keys and values of another call must not be read, whatever ended that call."""
        for transformer in self._wrapped_transformers():
            reset_kv_caches(transformer)

    def _wrapped_transformers(self) -> Iterator[xFuserTransformerBaseWrapper]:
        for module in modules_of(self).values():
            yield from wrapped_transformers(module)

    def _watched(self, passes: Iterator[Any]) -> Iterator[Any]:
        """`passes`, with an eye on what a callback changes of the pipeline."""
        for item in passes:
            guided = self._guidance_is_on()
            yield item
            if self._loop.has_callback and self._loop.step_is_complete:
                self._agree_to_interrupt()
                if self._guidance_is_on() != guided:
                    self._loop.run_whole_step()

    def _guidance_is_on(self) -> tuple[bool, ...]:
        """Whether guidance doubles the work of a step, as far as attributes tell.

        diffusers' pipelines have `do_classifier_free_guidance`, or compare their scales
        with 1, some with 0, in the loop.
        """
        told = getattr(self, "do_classifier_free_guidance", None)
        if told is not None:
            return (bool(told),)
        scales = [
            value
            for name, value in sorted(vars(self).items())
            if re.fullmatch(r"_\w*guidance_scale\w*", name)
            and isinstance(value, (int, float))
        ]
        return tuple(scale > bound for scale in scales for bound in (0, 1))

    def _agree_to_interrupt(self) -> None:
        """After a step with a callback: if one rank wants to stop, all stop."""
        attributes = vars(self)
        if "_interrupt" not in attributes:
            return
        group = parallel_state.get_replica_group()
        device = self._execution_device  # type: ignore[attr-defined]
        wanted = torch.tensor(int(bool(attributes["_interrupt"])), device=device)
        attributes["_interrupt"] = bool(all_reduce_max(wanted, group))


def _held(latents: Iterable[torch.Tensor | None]) -> Latents:
    return tuple(each for each in latents if each is not None)


def _as_given(given: tuple[torch.Tensor | None, ...], held: Latents) -> Any:
    """`held` with None where `given` has it; one bare, several as a tuple."""
    rest = iter(held)
    latents = tuple(None if each is None else next(rest) for each in given)
    return latents[0] if len(latents) == 1 else latents


def _batch_of_latents(given: int | None) -> int:
    """The batch of the loop's latents, where the caller does not give it."""
    if given is not None:
        return given
    shape = get_runtime_state().latents_shape
    assert shape is not None
    return shape[0]


def _check_entered(counter: int) -> None:
    if counter < 0:
        raise RuntimeError(
            "no transformer call of this step entered the port, expected at least one; "
            "wrap the pipeline after the transformer is compiled, hooked or replaced"
        )
