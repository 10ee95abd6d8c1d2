"""What passes between host and device within a call, noted once and answered while it is captured.

A CUDA graph holds what the device does. Some models also make numbers on the host in every call
and send them (rotary frequencies), or read numbers that follow from the call's arguments (how
many tokens a mask marks). A `HostRecorder` notes both while a call runs as it is; under a
`HostPlayer` the same call is captured, with the noted numbers in their place. The graph stands
for calls in which the arguments that were read from hold the same numbers.

Nothing is noted of a call whose numbers may differ although these arguments do not: random
ones, those that follow from weights, from messages of other ranks or from operations that are
not torch's own.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from xfuser_runtime.cuda.arguments import NotReplayable
from xfuser_runtime.cuda.notes import HostNotes, Read, Sent, version_of
from xfuser_runtime.cuda.waits import WAIT, sync_debug_mode, waits_noticed
from xfuser_runtime.transformers.outputs import map_tensors, tensors_in

aten = torch.ops.aten

#: Operations whose result the host waits for, or whose shape it does.
_READS = frozenset(
    {
        aten._local_scalar_dense.default,
        aten.equal.default,
        aten.nonzero.default,
        aten.repeat_interleave.Tensor,
    }
)
_INDEXING = frozenset(
    {
        aten.index.Tensor,
        aten.index_put.default,
        aten.index_put_.default,
    }
)
_MASKS = (torch.bool, torch.uint8)
#: Memory that may be filled by what torch does not see.
_UNFILLED = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_like.default,
        aten.empty_strided.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)

#: The arguments, by position, that a tensor follows from; None where that is not all.
Origin = frozenset[int] | None


class _HostMode(TorchDispatchMode):
    """Sees the operations that pass numbers between the host and a device.

    Compiled code is left as it is: without graph breaks it passes none.

    Args:
        device_type: of the device.
    """

    supports_higher_order_operators = True

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._device_type = device_type
        self._stack = contextlib.ExitStack()

    @classmethod
    def is_infra_mode(cls) -> bool:
        """True: torch.compile refuses to run under any other."""
        return True

    def __enter__(self) -> Any:
        self._stack.enter_context(_constants_in_sight())
        return super().__enter__()

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        self._stack.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _INDEXING:
            indices = [x for i in args[1] for x in self._places(i, args[0])]
            # With the values that `index_put` writes.
            values = [self._plain(x, args[0]) for x in args[2:3]]
            args = (args[0], indices, *values, *args[3:])
        elif func is aten.copy_.default and self._passes(args[1], args[0].device):
            value = self._pass(
                aten._to_copy.default, (args[1],), {"device": args[0].device}
            )
            args = (args[0], value, *args[2:])
        elif func is aten._to_copy.default:
            device = kwargs.get("device")
            if device is not None and self._passes(args[0], torch.device(device)):
                return self._pass(func, args, kwargs)
        elif func in _READS and any(map(self._is_on_device, tensors_in(args))):
            return self.read(func, args, kwargs)
        return self.other(func, args, kwargs)

    def sent(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        """The result of a copy to the device."""
        raise NotImplementedError

    def read(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operation that the host waits for."""
        raise NotImplementedError

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of any other operation."""
        return func(*args, **kwargs)

    def _is_on_device(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self._device_type

    def _passes(self, tensor: torch.Tensor, to: torch.device) -> bool:
        ends = {tensor.device.type, to.type}
        return len(ends) == 2 and self._device_type in ends

    def _pass(self, func: Any, args: Any, kwargs: Any) -> Any:
        is_read = self._is_on_device(args[0])
        return (self.read if is_read else self.sent)(func, args, kwargs)

    def _plain(
        self, index: torch.Tensor | None, indexed: torch.Tensor
    ) -> torch.Tensor | None:
        """An index of numbers where what it indexes is."""
        if index is None or not self._passes(index, indexed.device):
            return index
        found: torch.Tensor = self._pass(
            aten._to_copy.default, (index,), {"device": indexed.device}
        )
        return found

    def _places(
        self, index: torch.Tensor | None, indexed: torch.Tensor
    ) -> Iterator[torch.Tensor | None]:
        """Indices of numbers for one that may be a mask."""
        if index is None or index.dtype not in _MASKS or index.dim() == 0:
            yield self._plain(index, indexed)
            return
        on_device = self._is_on_device(index)
        places = (self.read if on_device else self.other)(
            aten.nonzero.default, (index,), {}
        )
        for column in self.other(aten.unbind.int, (places, 1), {}):
            yield self._plain(column, indexed)


class HostRecorder(_HostMode):
    """Within `with`: a call that runs as it is, noted.

    Args:
        arguments: the tensors of the call, in order.
        device_type: of the device.

    Attributes:
        notes: what was noted so far.
    """

    def __init__(self, arguments: Sequence[torch.Tensor], device_type: str) -> None:
        super().__init__(device_type)
        self.notes = HostNotes()
        self._arguments = arguments
        self._origins: dict[int, tuple[StorageWeakRef, Origin]] = {}
        # The same numbers are sent again by every block of some models.
        self._sent: dict[Any, Sent] = {}
        self._warnings: list[warnings.WarningMessage] = []
        self._own = {x.untyped_storage()._cdata for x in arguments}
        for position, argument in enumerate(arguments):
            # Arguments may be views of one tensor.
            self._put(argument, (self._origin(argument) or frozenset()) | {position})

    def __enter__(self) -> Any:
        if self._device_type == "cuda":
            self._warnings = self._stack.enter_context(waits_noticed())
        return super().__enter__()

    def __exit__(self, *details: Any) -> None:
        # torch warns when the model's own call returns, so the last one is not heard of before.
        self._notice_waits()
        super().__exit__(*details)

    def sent(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        source = args[0]
        value: torch.Tensor = self._awaited(func, args, kwargs)
        self._fix(
            [source], "the host sends numbers that are not the same in every call"
        )
        version = version_of(source)
        # A number of its own for what counts no changes.
        count = len(self._sent) if version is None else version
        key = (source.data_ptr(), source.shape, source.stride(), source.dtype)
        entry = self._sent.setdefault(
            (*key, value.dtype, count), Sent(source, version, value.clone())
        )
        self.notes.entries.append(entry)
        self._put(value, frozenset())
        return value

    def read(self, func: Any, args: Any, kwargs: Any) -> Any:
        value = self._awaited(func, args, kwargs)
        self._fix(
            tensors_in((args, kwargs)),
            "the host reads numbers that do not follow from the arguments alone",
        )
        self.notes.entries.append(Read(func, map_tensors(torch.clone, value)))
        for tensor in tensors_in(value):
            self._put(tensor, frozenset())
        return value

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        inputs = tensors_in((args, kwargs))
        origin = self._union(inputs) if _follows_from_inputs(func) else None
        # Numbers that stand in the code.
        if func is aten.lift_fresh.default:
            origin = frozenset()
        value = func(*args, **kwargs)
        written = list(_written(func, args, kwargs))
        found = [*tensors_in(value), *written]
        for tensor in found:
            self._put(tensor, origin)
        for tensor in written:
            # What an argument held when the call began is not known any more.
            if tensor.untyped_storage()._cdata in self._own:
                self._put(tensor, None)
        if any(map(self._is_on_device, found)):
            # A kernel gets a number of the host as it is now.
            numbers = [x for x in inputs if not self._is_on_device(x)]
            self._fix(numbers, "the host's numbers are not the same in every call")
        self._notice_waits()
        return value

    def _awaited(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operation of which it is known that the host waits for it."""
        if self._device_type != "cuda":
            return func(*args, **kwargs)
        with sync_debug_mode("default"):
            return func(*args, **kwargs)

    def _notice_waits(self) -> None:
        for warning in list(self._warnings):
            if WAIT in str(warning.message):
                self._warnings.remove(warning)
                where = _place(warning.filename, warning.lineno)
                self._refuse("the host waits for the device", where)

    def _fix(self, tensors: Sequence[torch.Tensor], refusal: str) -> None:
        """The call is as noted only while the arguments that these follow from are the same."""
        origin = self._union(tensors)
        if origin is None:
            self._refuse(refusal)
            return
        for position in origin - self.notes.fixed.keys():
            self.notes.fixed[position] = self._arguments[position].clone()

    def _refuse(self, what: str, where: str | None = None) -> None:
        if self.notes.reason is None:
            self.notes.reason = f"{what} ({where or _caller()})"

    def _put(self, tensor: torch.Tensor, origin: Origin) -> None:
        storage = tensor.untyped_storage()
        self._origins[storage._cdata] = (StorageWeakRef(storage), origin)

    def _origin(self, tensor: torch.Tensor) -> Origin:
        storage, origin = self._origins.get(
            tensor.untyped_storage()._cdata, (None, None)
        )
        if storage is None or storage.expired():
            # The host's own numbers are as constant as the code that holds them; nobody knows of
            # the device's: weights, what layers keep, what other operations left.
            return None if self._is_on_device(tensor) else frozenset()
        return origin

    def _union(self, tensors: Sequence[torch.Tensor]) -> Origin:
        found = [self._origin(tensor) for tensor in tensors]
        if any(origin is None for origin in found):
            return None
        return frozenset().union(*(origin or () for origin in found))


class HostPlayer(_HostMode):
    """Within `with`: the call again, with what was noted in the place of what passes.

    Args:
        notes: of a call of the same signature.
        device_type: of the device.
    """

    def __init__(self, notes: HostNotes, device_type: str) -> None:
        super().__init__(device_type)
        self._left = iter(notes.entries)

    def sent(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        entry = next(self._left, None)
        if not isinstance(entry, Sent) or not torch.equal(entry.source, args[0]):
            raise NotReplayable(
                f"the host sends other numbers in every call ({_caller()})"
            )
        # The call may write to it, and a replay begins with the noted numbers.
        return entry.value.clone()

    def read(self, func: Any, args: Any, kwargs: Any) -> Any:
        entry = next(self._left, None)
        if not isinstance(entry, Read) or entry.function is not func:
            raise NotReplayable(f"the host reads otherwise every time ({_caller()})")
        return map_tensors(torch.clone, entry.value)


def played(notes: HostNotes, device_type: str) -> AbstractContextManager[Any]:
    """Within `with`: the call is answered from its notes."""
    if not notes.entries:
        return contextlib.nullcontext()
    return HostPlayer(notes, device_type)


@contextlib.contextmanager
def _constants_in_sight() -> Iterator[None]:
    """Within the block `torch.tensor(numbers, device=...)` sends by an operation of its own."""
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


def _follows_from_inputs(func: Any) -> bool:
    """An operation of torch's own whose result has no other source than its inputs."""
    return (
        isinstance(func, torch._ops.OpOverload)
        and func.namespace in ("aten", "prims")
        and torch.Tag.nondeterministic_seeded not in func.tags
        and func not in _UNFILLED
    )


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    """The arguments that an operation writes to; all, where it does not say."""
    if not isinstance(func, torch._ops.OpOverload):
        yield from tensors_in((args, kwargs))
        return
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else None
            yield from tensors_in(kwargs.get(argument.name, given))


def _caller() -> str:
    """File and line of the model's code that is at work."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.split(".")[0] not in ("torch", "xfuser_runtime"):
            return _place(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return "torch"


def _place(file: str, line: int) -> str:
    """File and line for a message, from the installed package's folder on."""
    return f"{file.rpartition('site-packages/')[2]}:{line}"
