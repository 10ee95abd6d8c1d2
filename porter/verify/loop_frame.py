"""The local variable of a running pipeline that holds the latents between two steps."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch


class LoopFrame:
    """Reads the latents of a denoising loop that runs further up the stack.

    Args:
        function: the function that holds the loop.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._code = function.__code__
        self._name = _stepped_name(function)

    def latents(self) -> torch.Tensor | None:
        """The variable that `scheduler.step` takes as its sample; None where there is none."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not self._code:
            frame = frame.f_back
        if frame is None or self._name is None:
            return None
        value = frame.f_locals.get(self._name)
        return value if isinstance(value, torch.Tensor) else None


def _stepped_name(function: Callable[..., Any]) -> str | None:
    """The variable that all calls of `scheduler.step` in a function take as their sample."""
    names = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "self.scheduler.step"
        ):
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            sample = given.get("sample") or (
                node.args[2] if len(node.args) > 2 else None
            )
            # A cast or a slice of a variable is the variable's.
            while isinstance(sample, ast.Attribute | ast.Call | ast.Subscript):
                sample = sample.func if isinstance(sample, ast.Call) else sample.value
            names.add(sample.id if isinstance(sample, ast.Name) else None)
    return names.pop() if len(names) == 1 else None
