"""Parameters and buffers that another rank holds: they can be asked about, not computed with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xfuser_runtime.errors import NotSupportedError

#: What may be asked of an absent tensor: attributes of `torch.Tensor`, and methods of it.
_ATTRIBUTES = (
    "dtype",
    "grad",
    "is_leaf",
    "is_meta",
    "is_nested",
    "is_quantized",
    "is_sparse",
    "itemsize",
    "layout",
    "names",
    "nbytes",
    "ndim",
    "requires_grad",
    "shape",
)
_METHODS = (
    torch.Tensor.__hash__,
    torch.Tensor.__len__,
    torch.Tensor.dim,
    torch.Tensor.element_size,
    torch.Tensor.is_complex,
    torch.Tensor.is_floating_point,
    torch.Tensor.nelement,
    torch.Tensor.numel,
    torch.Tensor.requires_grad_,
    torch.Tensor.size,
    torch.Tensor.stride,
)


@dataclass
class Sharing:
    """What the modules of one encoder have in common on this rank.

    Attributes:
        name: of the component.
        holds_weights: True on the first rank of the replica.
        device: where the encoder counts as placed; read on ranks without weights only.
        running: a call is under way on the first rank, whose inner calls are no calls of
            the pipeline.
    """

    name: str
    holds_weights: bool
    device: torch.device
    running: bool = False


class Absent(torch.Tensor):
    """A tensor on the meta device that answers for its type, shape and the rank's device.

    Anything else raises one line: torch's own words for a tensor without storage would not
    say why there is none, and some operations return meaningless tensors instead.
    """

    path: str
    sharing: Sharing

    @classmethod
    def of(cls, tensor: torch.Tensor, path: str, sharing: Sharing) -> Absent:
        """A stand-in for `tensor`, which may be a parameter; its memory is not kept.

        Args:
            tensor: of any shape and device.
            path: its name, the component's first.
            sharing: of the encoder.
        """
        made = cls._make(tensor.shape, tensor.dtype, tensor.requires_grad)
        made.path, made.sharing = path, sharing
        # What `isinstance(x, nn.Parameter)` looks at in subclasses of tensors.
        made._is_param = isinstance(tensor, nn.Parameter)
        return made

    @classmethod
    def _make(
        cls, shape: Sequence[int], dtype: torch.dtype, requires_grad: bool
    ) -> Absent:
        empty = torch.empty(tuple(shape), dtype=dtype, device="meta")
        made: Absent = torch.Tensor._make_subclass(cls, empty, requires_grad)
        return made

    def convert(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Take the type and device that `change` (of `nn.Module._apply`) gives a tensor."""
        probe = change(torch.empty(0, dtype=self.dtype, device=self.device))
        if probe.device.type != "meta":
            self.sharing.device = probe.device
        self.become(probe.dtype)

    def become(self, dtype: torch.dtype) -> None:
        """Take another data type in place, so that tied parameters stay one."""
        if dtype != self.dtype:
            empty = torch.empty(tuple(self.shape), dtype=dtype, device="meta")
            with torch._C.DisableTorchFunctionSubclass():
                self.data = empty

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answers questions, refuses the rest.

        Raises:
            NotSupportedError: names the tensor and the operation.
        """
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        reads = func.__name__ == "__get__"
        if reads and attribute == "device" and isinstance(args[0], cls):
            return args[0].sharing.device
        if func in _METHODS or (reads and attribute in _ATTRIBUTES):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        held = _first_absent([*args, *(kwargs or {}).values()])
        name = "an encoder's weight" if held is None else held.path
        raise NotSupportedError(
            f"{attribute if reads else func.__name__} of {name}, which the first rank of the "
            "replica holds alone, expected calls of the encoder, its modules or its methods; "
            "run without text_encoders_on_first_rank"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Absent:
        made = self._make(self.shape, self.dtype, self.requires_grad)
        made.path, made.sharing = self.path, copy.deepcopy(self.sharing, memo)
        made._is_param = self._is_param
        memo[id(self)] = made
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Absent({self.path}, {tuple(self.shape)}, {self.dtype})"


def _first_absent(values: Sequence[Any]) -> Absent | None:
    for value in values:
        if isinstance(value, Absent):
            return value
        if isinstance(value, (list, tuple)):
            found = _first_absent(value)
            if found is not None:
                return found
    return None


def take_weights_away(
    encoder: nn.Module, sharing: Sharing, dtypes: Mapping[str, torch.dtype]
) -> None:
    """Put an `Absent` in the place of every parameter and buffer, so that memory is freed.

    Args:
        encoder: its modules are changed in place.
        sharing: of the encoder.
        dtypes: by name, those of the first rank.
    """
    made: dict[int, Absent] = {}
    for path, module in encoder.named_modules(remove_duplicate=False):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or isinstance(tensor, Absent):
                    continue
                full = f"{path}.{name}" if path else name
                if id(tensor) not in made:
                    absent = Absent.of(tensor, f"{sharing.name}.{full}", sharing)
                    absent.become(dtypes[full])
                    # Held with the original, whose id no other tensor may get meanwhile.
                    made[id(tensor)] = absent
                    absent.__dict__["original"] = tensor
                tensors[name] = made[id(tensor)]
    for absent in made.values():
        del absent.__dict__["original"]
