"""Calls of an encoder's modules and methods: run on the first rank, received by the others.

The class of every module of an encoder is swapped for a subclass whose `forward`, `__call__`
and computing methods go through `shared_call`. On the first rank what such a call does inside
is left alone. Every rank of the replica must make the same calls in the same order.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from xfuser_runtime.base_wrapper import EqualsUpstream, swap_class, xFuserBaseWrapper
from xfuser_runtime.distributed import parallel_state
from xfuser_runtime.distributed.collectives import broadcast_object
from xfuser_runtime.distributed.parallel_state import Group
from xfuser_runtime.distributed.runtime_state import (
    get_runtime_state,
    runtime_state_is_initialized,
)
from xfuser_runtime.encoders.absent import Absent, Sharing
from xfuser_runtime.encoders.results import Packed, pack, receive, send_tensors
from xfuser_runtime.errors import NotSupportedError, StateError
from xfuser_runtime.randomness import find_generators, random_states, set_random_states

_SHARING = "_xfuser_sharing"
_PATH = "_xfuser_path"
#: Modules that hold others and compute nothing.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
#: Methods that change what is computed, which the first rank alone would do.
_REFUSED = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "load_adapter",
    "add_adapter",
)


@dataclass(frozen=True)
class _Answer:
    """What the first rank says of a call before it sends the tensors.

    Attributes:
        call: its name.
        packed: the result; None where the call failed.
        error: why it failed.
        states: of the random generators, where the call drew from them.
        device_type: of the encoder after the call.
    """

    call: str
    packed: Packed | None
    error: str = ""
    states: list[torch.Tensor] | None = None
    device_type: str = "cpu"


class SharedModule(xFuserBaseWrapper, metaclass=EqualsUpstream):
    """A module of an encoder whose weights the first rank of the replica holds.

    Subclasses are made by `share_module`, one for each class of modules.
    """

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Upstream's; without weights only the type and the device are taken over."""
        if vars(self)[_SHARING].holds_weights:
            return super()._apply(fn, recurse)  # type: ignore[misc]
        module: Any = self
        for child in module.children() if recurse else ():
            child._apply(fn)
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if isinstance(tensor, Absent):
                tensor.convert(fn)
        return self

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Upstream's, refused on a rank without the weights.

        Raises:
            NotSupportedError: this rank has none.
        """
        sharing: Sharing = vars(self)[_SHARING]
        if not sharing.holds_weights:
            raise NotSupportedError(
                f"save_pretrained of {sharing.name} on rank "
                f"{parallel_state.get_world_group().rank_in_group}, which holds no weights of "
                "it, expected the first rank of a replica; save there alone"
            )
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]


def sharing_of(module: nn.Module) -> Sharing | None:
    """What a module shares with the others of its encoder; None where it is not shared."""
    found: Sharing | None = vars(module).get(_SHARING)
    return found


def share_module(module: nn.Module, path: str, sharing: Sharing) -> None:
    """Swap the class of one module of an encoder; hooks and state-dict keys stay.

    Args:
        module: in any device.
        path: its name, the component's first.
        sharing: of the encoder.
    """
    swap_class(module, _shared_class(type(module)))
    vars(module).update({_SHARING: sharing, _PATH: path})


@functools.cache
def _shared_class(original: type[nn.Module]) -> type:
    namespace: dict[str, Any] = {
        "__module__": original.__module__,
        "__doc__": original.__doc__,
    }
    for name in computing_methods(original):
        namespace[name] = _shared(getattr(original, name), name)
    for name in _REFUSED:
        if hasattr(original, name):
            namespace[name] = _refused(getattr(original, name), name)
    return type(SharedModule)(original.__name__, (SharedModule, original), namespace)


def computing_methods(original: type[nn.Module]) -> list[str]:
    """Names of the methods of a class that compute with its weights, as far as a name tells.

    These are `forward`, `generate`, and what the class and its parents add to the bases of
    all models. A method that is missed meets an `Absent`, which refuses.
    """
    if issubclass(original, _CONTAINERS):
        return []
    names = ["__call__", "forward"]
    if issubclass(original, GenerationMixin):
        names.append("generate")
    if original.__module__.split(".")[0] == "torch":
        return names
    common = {*dir(nn.Module), *dir(PreTrainedModel), *dir(GenerationMixin)}
    return names + [
        name
        for name in dir(original)
        if not name.startswith("_")
        and name not in common
        and inspect.isfunction(inspect.getattr_static(original, name))
    ]


def _shared(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return shared_call(self, method, name, args, kwargs)

    # A compiled encoder runs its own code; what ranks say to each other is not traced.
    disabled: Callable[..., Any] = torch.compiler.disable(call)
    return disabled


def _refused(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if vars(self)[_SHARING].running:
            return method(self, *args, **kwargs)
        raise NotSupportedError(
            f"{name} on {vars(self)[_PATH]}, which runs on the first rank of the replica "
            "alone, expected an encoder that every rank runs; run without "
            "text_encoders_on_first_rank"
        )

    return call


def shared_call(
    module: nn.Module,
    method: Callable[..., Any],
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The result of `method(module, *args, **kwargs)` on the first rank, on every rank.

    A collective call of the replica. Random generators are left alike on all ranks.

    Raises:
        NotSupportedError: in the denoising loop or after it, where ranks go different ways.
        StateError: the session has ended, the ranks make different calls, or the call
            failed on the first rank, which raises its own error.
    """
    sharing: Sharing = vars(module)[_SHARING]
    if sharing.running:
        return method(module, *args, **kwargs)
    path = vars(module)[_PATH]
    call = path if name == "__call__" else f"{path}.{name}"
    if runtime_state_is_initialized() and get_runtime_state().step >= 0:
        raise NotSupportedError(
            f"a call of {call} in the denoising loop or after it, where ranks go different "
            "ways, expected calls before it; run without text_encoders_on_first_rank"
        )
    group = parallel_state.get_replica_group()
    if sharing.holds_weights != (group.rank_in_group == 0):
        raise StateError(
            f"a call of {call} on rank {group.rank_in_group} of a replica of "
            f"{group.world_size}, expected the session in which it was wrapped; load the "
            "pipeline again"
        )
    generators = find_generators(args, kwargs)
    if sharing.holds_weights:
        sharing.running = True
        try:
            run = functools.partial(method, module, *args, **kwargs)
            return _run_and_send(run, call, generators, module, group)
        finally:
            sharing.running = False
    return _receive(call, generators, sharing, group)


def _run_and_send(
    run: Callable[[], Any],
    call: str,
    generators: list[torch.Generator],
    module: nn.Module,
    group: Group,
) -> Any:
    before = random_states(generators)
    try:
        result = run()
        packed, tensors = pack(result)
    except Exception as error:
        # The others wait for this call: they are told, and raise as well.
        lines = str(error).strip().splitlines() or ["no message"]
        words = f"{type(error).__name__}: {lines[0]}"
        broadcast_object(_Answer(call, None, error=words), group)
        raise
    after = random_states(generators)
    pairs = zip(before, after, strict=True)
    drew = any(not torch.equal(old, new) for old, new in pairs)
    device = next((x.device.type for x in module.parameters()), "cpu")
    answer = _Answer(call, packed, states=after if drew else None, device_type=device)
    broadcast_object(answer, group)
    send_tensors(tensors, packed, group)
    return result


def _receive(
    call: str, generators: list[torch.Generator], sharing: Sharing, group: Group
) -> Any:
    answer: _Answer = broadcast_object(None, group)
    if answer.packed is None:
        raise StateError(
            f"{answer.call} failed on rank {group.ranks[0]} ({answer.error}), expected a "
            "result from there; see the error of that rank"
        )
    # Taken in any case: the first rank sends, and must not wait for a rank that raises.
    result = receive(answer.packed, group)
    if answer.call != call:
        _refuse_other_call(call, answer.call, group)
    if answer.states is not None:
        set_random_states(answer.states, generators)
    if answer.device_type != sharing.device.type and answer.device_type != "meta":
        index = torch.cuda.current_device() if answer.device_type == "cuda" else None
        sharing.device = torch.device(answer.device_type, index)
    return result


def _refuse_other_call(own: str, theirs: str, group: Group) -> NoReturn:
    raise StateError(
        f"a call of {own} on rank {group.ranks[group.rank_in_group]} and of {theirs} on rank "
        f"{group.ranks[0]}, expected the same calls on all ranks of a replica; pass the same "
        "arguments on every rank"
    )
