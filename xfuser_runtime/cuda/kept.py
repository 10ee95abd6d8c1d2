"""What the passes over patches keep for each other in a transformer, as a captured call sees it.

A graph reads and writes such tensors at the addresses of its capture, and skips the Python that
decides which of them a pass reads. So a call may be replayed where that Python would decide as it
did, and at the same addresses.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xfuser_runtime.layers.base import CallSites


@dataclass(frozen=True)
class KeptState:
    """The state that passes inherit, without the tensors' data.

    Attributes:
        form: places, shapes and settings.
        addresses: of the tensors.
    """

    form: tuple[Hashable, ...] = ()
    addresses: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, sites: Iterable[CallSites[Any]], streams: Mapping[Any, Any]
    ) -> KeptState:
        """The state of layers by place of use, and of the whole streams that patches fill."""
        form: list[Hashable] = []
        addresses: list[int] = []
        for value in (*_states(sites), *_leaves(streams)):
            if isinstance(value, torch.Tensor):
                form.append((value.shape, value.stride(), value.dtype, value.device))
                addresses.append(value.data_ptr())
            else:
                form.append(value)
        return cls(tuple(form), tuple(addresses))


def call_sites(model: nn.Module) -> Iterator[CallSites[Any]]:
    """Where the layers of a model keep state; the order is that of the modules."""
    for module in model.modules():
        for name, held in vars(module).items():
            if name.startswith("_xfuser") and hasattr(held, "__dict__"):
                found = (held, *vars(held).values())
                yield from (x for x in found if isinstance(x, CallSites))


def _states(sites: Iterable[CallSites[Any]]) -> Iterator[Any]:
    for site in sites:
        for place, state in site.items():
            yield place
            yield from _leaves(vars(state))


def _leaves(value: Any) -> Iterator[Any]:
    """The tensors and the settings in nested dictionaries, with their names."""
    if not isinstance(value, Mapping):
        yield value
        return
    for name, item in value.items():
        yield name
        yield from _leaves(item)
