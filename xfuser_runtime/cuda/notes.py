"""What a transformer call sent to the device and read from it, and for which calls that holds."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

#: Comparisons that are remembered for each note.
MAX_COMPARISONS = 64


@dataclass(frozen=True)
class Sent:
    """Numbers of the host, and what the device got."""

    source: torch.Tensor
    version: int | None
    value: torch.Tensor

    @property
    def is_current(self) -> bool:
        """False once the host has written to its numbers."""
        return self.version == version_of(self.source)


@dataclass
class Read:
    """An operation that the host waited for, and its result."""

    function: Any
    value: Any


@dataclass(frozen=True)
class Comparison:
    """An argument that was compared, and whether it had the noted numbers."""

    tensor: weakref.ref[torch.Tensor]
    version: int | None
    is_equal: bool

    def is_of(self, given: torch.Tensor, version: int | None) -> bool:
        """It is this very tensor, and nothing was written to it since."""
        return self.tensor() is given and self.version == version is not None


@dataclass
class HostNotes:
    """What a call sent and read.

    Attributes:
        entries: in the order of the call.
        fixed: positions and numbers of the arguments that the entries follow from.
        reason: why the call cannot be captured with them; None where it can.
    """

    entries: list[Sent | Read] = field(default_factory=list)
    fixed: dict[int, torch.Tensor] = field(default_factory=dict)
    reason: str | None = None

    def __post_init__(self) -> None:
        # What comparisons came to, so that the same tensors are not compared at each step.
        self._compared: dict[tuple[int, int], Comparison] = {}

    def hold(self, arguments: Sequence[torch.Tensor]) -> bool:
        """The entries are those of a call with these arguments, of the shapes of the noted one."""
        return all(
            self._is_equal(position, arguments[position]) for position in self.fixed
        ) and all(x.is_current for x in self.entries if isinstance(x, Sent))

    def _is_equal(self, position: int, given: torch.Tensor) -> bool:
        version = version_of(given)
        key = (position, id(given))
        known = self._compared.get(key)
        if known is not None and known.is_of(given, version):
            return known.is_equal
        is_equal = torch.equal(self.fixed[position], given)
        self._compared[key] = Comparison(weakref.ref(given), version, is_equal)
        while len(self._compared) > MAX_COMPARISONS:
            self._compared.pop(next(iter(self._compared)))
        return is_equal


def version_of(tensor: torch.Tensor) -> int | None:
    """How often it was written to; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version
