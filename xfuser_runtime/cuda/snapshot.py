"""What a captured transformer call has baked in: the modules, the weights' addresses, settings.

A CUDA graph holds addresses and Python decisions of the moment of its capture. Loading a LoRA,
changing its scale, moving the weights or exchanging a processor all show up in the modules'
own dictionaries, so these are what is compared, about a millisecond for a thousand modules.
"""

from __future__ import annotations

from typing import Any

from torch import nn

# What every module has; of these only the entries of the first group can change a call.
_WATCHED = (
    "_modules",
    "_parameters",
    "_buffers",
    "_forward_hooks",
    "_forward_pre_hooks",
)
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_PLAIN = (bool, int, float, str, type(None))
_OWN = "_xfuser"


class ModelSnapshot:
    """The state of a model that its captured calls depend on.

    Args:
        model: the module that is called.
    """

    def __init__(self, model: nn.Module) -> None:
        self._sizes: list[tuple[dict[str, Any], int]] = []
        self._entries: list[tuple[dict[str, Any], str, Any]] = []
        self._lists: list[tuple[dict[str, Any], str, list[Any]]] = []
        self._addresses: list[tuple[Any, int]] = []
        for module in model.modules():
            held = vars(module)
            self._sizes.append((held, len(held)))
            for name in _WATCHED:
                self._watch(held[name])
            for name, value in held.items():
                if name not in _INTERNAL and not name.startswith(_OWN):
                    self._watch_entry(held, name, value)
            for tensors in (held["_parameters"], held["_buffers"]):
                self._addresses += [
                    (x, x.data_ptr()) for x in tensors.values() if x is not None
                ]

    def holds(self) -> bool:
        """True while nothing that a captured call depends on has changed."""
        return (
            all(len(held) == size for held, size in self._sizes)
            and all(
                _is_same(held.get(name), value) for held, name, value in self._entries
            )
            and all(
                _are_same(held.get(name), values) for held, name, values in self._lists
            )
            and all(x.data_ptr() == address for x, address in self._addresses)
        )

    def _watch(self, held: dict[str, Any]) -> None:
        self._sizes.append((held, len(held)))
        self._entries += [(held, name, value) for name, value in held.items()]

    def _watch_entry(self, held: dict[str, Any], name: str, value: Any) -> None:
        if isinstance(value, list):
            # Some models make a list of the same tensors anew in every call.
            self._lists.append((held, name, list(value)))
            return
        self._entries.append((held, name, value))
        if isinstance(value, dict):
            self._watch(value)
        elif not isinstance(value, (nn.Module, type)) and type(value) not in _PLAIN:
            # A processor, say: its own plain settings, one level deep.
            self._watch(
                vars(value)
                if hasattr(value, "__dict__") and name == "processor"
                else {}
            )


def _is_same(found: Any, value: Any) -> bool:
    return found is value or (type(value) in _PLAIN and found == value)


def _are_same(found: Any, values: list[Any]) -> bool:
    return (
        isinstance(found, list)
        and len(found) == len(values)
        and all(map(_is_same, found, values))
    )
