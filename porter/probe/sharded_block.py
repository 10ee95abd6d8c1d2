"""One block, run whole and run as a rank would run it, with every module's tensors kept.

In a rank's run, modules and attention calls whose result the runtime makes whole return
their part of the whole run's result, so that what is wrong downstream of them is the
block's own doing.

Shapes: query (B, H, Sq, D), key and value (B, H, Sk, D).
"""

from __future__ import annotations

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from porter.analysis.mixing import TokenCut
from porter.probe.cuts import Shard
from porter.probe.leaves import tensor_leaves
from porter.probe.present_tokens import present_tokens
from porter.verify.hooks import AttentionCall, replaced_attention

#: Of attention modules: brings a mask to the number of keys.
MASK_METHOD = "prepare_attention_mask"

Place = tuple[str, int]
"""A module by path, and which of its uses in the block."""


@dataclass
class Use:
    """One call of a module.

    Attributes:
        inputs: its tensors, by parameter and path below it.
        others: its integers and floats, by parameter.
        outputs: what it returned, by path; None if it raised.
        result: the same as it was.
    """

    inputs: dict[str, torch.Tensor]
    others: dict[str, Any]
    outputs: dict[str, torch.Tensor] | None = None
    result: Any = None


@dataclass
class Trace:
    """What one run of a block did.

    Attributes:
        uses: by place, in the order in which they ended; those that raised come last.
        attention: kernel calls with their results, by place.
        outputs: of the block, None if it raised.
        error: what it raised.
    """

    uses: dict[Place, Use] = field(default_factory=dict)
    attention: dict[Place, tuple[AttentionCall, torch.Tensor]] = field(
        default_factory=dict
    )
    outputs: dict[str, torch.Tensor] | None = None
    error: Exception | None = None


Attend = Callable[[Place, AttentionCall], torch.Tensor]


class BlockRunner:
    """Runs one block and traces it.

    Args:
        block: the block.
        attend: answers its attention calls.
        replaced: outputs of modules that do not run, by path: called with the use's number.
        padded: of a rank's run, filled with the processors that would pad a mask of all
            keys by the number of the rank's tokens; here as in the port they do not.
    """

    def __init__(
        self,
        block: nn.Module,
        attend: Attend,
        replaced: Mapping[str, Callable[[int], Any]],
        padded: set[type] | None = None,
    ) -> None:
        self._block = block
        self._attend = attend
        self._replaced = replaced
        self._padded = padded
        self._stack: list[tuple[Place, Use]] = []
        self._counts: dict[str, int] = {}
        self._calls: dict[str, int] = {}
        self.trace = Trace()

    def run(self, arguments: Mapping[str, Any]) -> Trace:
        """Run it on arguments by parameter."""
        signature = inspect.signature(self._block.forward)
        bound = inspect.BoundArguments(signature, OrderedDict(arguments))
        with (
            self._hooked(),
            torch.no_grad(),
            replaced_attention(self._attention),
            present_tokens(self._block, self._module),
        ):
            try:
                output = self._block(*bound.args, **bound.kwargs)
                self.trace.outputs = _copies(output)
            except Exception as error:  # whatever a block does with too few tokens
                self.trace.error = error
                for place, use in reversed(self._stack):
                    self.trace.uses[place] = use
        return self.trace

    def _module(self) -> nn.Module | None:
        """The module that runs."""
        path = self._stack[-1][0][0] if self._stack else ""
        return self._block.get_submodule(path) if path else None

    @contextlib.contextmanager
    def _hooked(self) -> Iterator[None]:
        handles = []
        with contextlib.ExitStack() as stack:
            for path, module in self._block.named_modules():
                if not path:
                    continue
                if path in self._replaced:
                    stack.enter_context(self._bypassed(path, module))
                if self._padded is not None and hasattr(module, MASK_METHOD):
                    stack.enter_context(_unpadded(module, self._padded))
                handles.append(
                    module.register_forward_pre_hook(
                        self._enter(path), with_kwargs=True
                    )
                )
                handles.append(module.register_forward_hook(self._leave))
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    @contextlib.contextmanager
    def _bypassed(self, path: str, module: nn.Module) -> Iterator[None]:
        own = vars(module).get("forward")
        module.forward = lambda *_, **__: self._replaced[path](self._stack[-1][0][1])
        try:
            yield
        finally:
            del module.forward
            if own is not None:
                module.forward = own

    def _enter(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            number = self._counts[path] = self._counts.get(path, -1) + 1
            found = bound_arguments(module, args, kwargs)
            others = {
                name: value
                for name, value in found.items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            }
            self._stack.append(((path, number), Use(_copies(found), others)))

        return hook

    def _leave(self, _module: nn.Module, _args: Any, output: Any) -> None:
        place, use = self._stack.pop()
        use.outputs, use.result = _copies(output), output
        self.trace.uses[place] = use

    def _attention(self, call: AttentionCall) -> torch.Tensor:
        path = self._stack[-1][0][0] if self._stack else ""
        number = self._calls[path] = self._calls.get(path, -1) + 1
        result = self._attend((path, number), call)
        self.trace.attention[path, number] = (call, result)
        return result


@contextlib.contextmanager
def _unpadded(module: nn.Module, padded: set[type]) -> Iterator[None]:
    """A mask of another length than asked for keeps it; the processor is noted."""
    original = getattr(module, MASK_METHOD)

    def prepare(
        mask: torch.Tensor | None, length: int, *args: Any, **kwargs: Any
    ) -> Any:
        if mask is not None and mask.shape[-1] != length:
            padded.add(type(getattr(module, "processor", None)))
            length = mask.shape[-1]
        return original(mask, length, *args, **kwargs)

    setattr(module, MASK_METHOD, prepare)
    try:
        yield
    finally:
        delattr(module, MASK_METHOD)


def part_of(
    value: Any, cuts: Mapping[str, TokenCut], shard: Shard, path: str = ""
) -> Any:
    """A nested value with the rank's part of every tensor that has a cut."""
    if isinstance(value, torch.Tensor):
        return shard.select(value, cuts[path]) if path in cuts else value
    if isinstance(value, dict):
        return {k: part_of(v, cuts, shard, f"{path}.{k}") for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(
            part_of(item, cuts, shard, f"{path}.{i}" if path else str(i))
            for i, item in enumerate(value)
        )
    return value


def bound_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of a call of `module`, by parameter."""
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    return dict(list(bound.arguments.items())[1:])


def _copies(value: Any) -> dict[str, torch.Tensor]:
    return {path: leaf.detach().clone() for path, leaf in tensor_leaves(value)}
