"""Which token of which block argument each key of an attention call comes from.

The block runs on leaves that require gradients, and every attention call returns a value
without gradient, so a row of its value argument depends on its own token alone: the row
of the block's argument with a gradient is where it comes from.  Keys lie in the same
order; they are not asked because position embeddings reach them as well.

Shapes: value (B, H, Sk, D).
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from porter.verify.hooks import AttentionCall, replaced_attention


class KeyOrigins:
    """Runs one block and tells the origin of every attention module's keys.

    Args:
        block: the block to run.
        args, kwargs: its arguments, as the model passed them.
        axes: token dimension of each parameter of the block that may hold tokens.
        carried: the parameters that the loop carries.  A value row may depend on a
            per-token modulation too; the carried stream is then its origin.
    """

    def __init__(
        self,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        axes: Mapping[str, int],
        carried: set[str],
    ) -> None:
        self._block = block
        bound = inspect.signature(type(block).forward).bind(block, *args, **kwargs)
        self._arguments = dict(list(bound.arguments.items())[1:])
        self._axes = {
            name: dim
            for name, dim in axes.items()
            if self._arguments[name].is_floating_point()
        }
        self._carried = carried
        self._leaves: dict[str, torch.Tensor] = {}
        self._stack: list[str] = []
        self.modules: dict[str, nn.Module] = {}
        self.keys: dict[str, tuple[tuple[str, int], ...] | None] = {}

    def run(self) -> KeyOrigins:
        """Fill `keys`: by module path, (parameter, row) of each key row, None if unclear."""
        handles = []
        for path, module in self._block.named_modules():
            if path:
                handles.append(module.register_forward_pre_hook(self._enter(path)))
                handles.append(module.register_forward_hook(self._leave))
        self._leaves = {
            name: self._arguments[name].detach().clone().requires_grad_()
            for name in self._axes
        }
        bound = self._arguments | self._leaves
        try:
            with torch.enable_grad(), replaced_attention(self._attend):
                self._call(bound)
        finally:
            for handle in handles:
                handle.remove()
        return self

    def _call(self, arguments: dict[str, Any]) -> None:
        signature = inspect.signature(self._block.forward)
        bound = inspect.BoundArguments(signature, OrderedDict(arguments))
        self._block(*bound.args, **bound.kwargs)

    def _enter(self, path: str) -> Any:
        def hook(module: nn.Module, _: Any) -> None:
            self._stack.append(path)
            self.modules[path] = module

        return hook

    def _leave(self, *_: Any) -> None:
        self._stack.pop()

    def _attend(self, call: AttentionCall) -> torch.Tensor:
        path = self._stack[-1] if self._stack else ""
        origins = self._origins(call.value)
        if path in self.keys and self.keys[path] != origins:
            origins = None
        self.keys[path] = origins
        return call.run().detach()

    def _origins(self, value: torch.Tensor) -> tuple[tuple[str, int], ...] | None:
        found = []
        for row in range(value.shape[-2]):
            if not value.requires_grad:
                return ()
            gradients = torch.autograd.grad(
                value[..., row, :].double().square().sum(),
                list(self._leaves.values()),
                retain_graph=True,
                allow_unused=True,
            )
            rows = [
                (name, index)
                for name, gradient in zip(self._leaves, gradients, strict=True)
                if gradient is not None
                for index in _touched(gradient, self._axes[name])
            ]
            rows = [item for item in rows if item[0] in self._carried] or rows
            if len(rows) != 1:
                return None
            found.append(rows[0])
        return tuple(found)


def _touched(gradient: torch.Tensor, dim: int) -> list[int]:
    """Rows along `dim` with any gradient."""
    others = [d for d in range(gradient.ndim) if d != dim]
    rows: list[int] = gradient.abs().sum(dim=others).nonzero().flatten().tolist()
    return rows


def runs_of(origins: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...] | None:
    """Origins as whole streams in order, (name, length); None if they are mixed up."""
    runs: list[tuple[str, int]] = []
    for name, row in origins:
        if runs and runs[-1][0] == name and row == runs[-1][1]:
            runs[-1] = (name, row + 1)
        elif row == 0 and name not in [run[0] for run in runs]:
            runs.append((name, 1))
        else:
            return None
    return tuple(runs)
