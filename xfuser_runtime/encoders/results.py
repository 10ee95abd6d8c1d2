"""What a call returned, sent from the first rank of a group to the others.

The structure travels pickled, the tensors beside it, each from its memory into memory laid
out alike: an operation may round otherwise on a tensor with other strides.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xfuser_runtime.distributed.collectives import broadcast
from xfuser_runtime.distributed.parallel_state import Group
from xfuser_runtime.errors import NotSupportedError


@dataclass(frozen=True)
class TensorPlace:
    """How a tensor lies in memory.

    Attributes:
        dtype, size, stride: the tensor's.
        extent: elements from its first to its last one in memory.
        device_type: each rank has its own device of that type.
    """

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    extent: int
    device_type: str

    @classmethod
    def of(cls, x: torch.Tensor) -> TensorPlace:
        """The place of a tensor with strides.

        Raises:
            NotSupportedError: a sparse, quantised or nested tensor, or one without storage.
        """
        if x.layout != torch.strided or x.is_quantized or x.is_meta or x.is_nested:
            raise NotSupportedError(
                f"a result with a tensor of layout {x.layout} on {x.device}, expected dense "
                "tensors; run without text_encoders_on_first_rank"
            )
        steps = zip(x.shape, x.stride(), strict=True)
        extent = 1 + sum((n - 1) * step for n, step in steps) if x.numel() else 0
        return cls(x.dtype, tuple(x.shape), x.stride(), extent, x.device.type)

    def device(self) -> torch.device:
        """This rank's device of the type."""
        if self.device_type == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device(self.device_type)


@dataclass(frozen=True)
class Packed:
    """A result without its tensors.

    Attributes:
        structure: pickled; each tensor is its index in `places`.
        places: of the tensors.
    """

    structure: bytes
    places: tuple[TensorPlace, ...]


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[torch.Tensor] = []
        self._indices: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if isinstance(obj, nn.Module):
            raise NotSupportedError(
                f"a result with a module, {type(obj).__name__}, expected tensors; run "
                "without text_encoders_on_first_rank"
            )
        if not isinstance(obj, torch.Tensor):
            return None
        if id(obj) not in self._indices:
            self._indices[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return self._indices[id(obj)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, structure: bytes, tensors: list[torch.Tensor]) -> None:
        super().__init__(io.BytesIO(structure))
        self._tensors = tensors

    def persistent_load(self, pid: Any) -> torch.Tensor:
        return self._tensors[pid]


def pack(result: Any) -> tuple[Packed, list[torch.Tensor]]:
    """The result in two parts: what `Packed` says, and its tensors.

    Raises:
        NotSupportedError: it holds what cannot be sent.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    try:
        pickler.dump(result)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise NotSupportedError(
            f"a {type(result).__name__} that cannot be sent ({error}), expected tensors in "
            "containers; run without text_encoders_on_first_rank"
        ) from error
    tensors = [
        tensor.detach().resolve_conj().resolve_neg() for tensor in pickler.tensors
    ]
    places = tuple(TensorPlace.of(tensor) for tensor in tensors)
    return Packed(file.getvalue(), places), tensors


def send_tensors(tensors: list[torch.Tensor], packed: Packed, group: Group) -> None:
    """Send the tensors of a packed result; the others call `receive`."""
    for tensor, place in zip(tensors, packed.places, strict=True):
        if place.extent:
            memory = tensor.as_strided((place.extent,), (1,), tensor.storage_offset())
            broadcast(memory.view(torch.uint8), group)


def receive(packed: Packed, group: Group) -> Any:
    """The result that the first rank of the group packed and sends, on this rank's device."""
    tensors = []
    for place in packed.places:
        memory = torch.empty(place.extent, dtype=place.dtype, device=place.device())
        if place.extent:
            broadcast(memory.view(torch.uint8), group)
        tensors.append(memory.as_strided(place.size, place.stride))
    return _Unpickler(packed.structure, tensors).load()
