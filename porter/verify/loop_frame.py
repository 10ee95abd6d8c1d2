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
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for statement in ast.walk(tree):
        if not isinstance(statement, ast.Assign | ast.Return | ast.Expr):
            continue
        bound = _bound_first(statement)
        for node in ast.walk(statement):
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) == "self.scheduler.step"
            ):
                names.add(_sample(node, bound))
    return names.pop() if len(names) == 1 else None


def _bound_first(statement: ast.stmt) -> str | None:
    """The first name that an assignment binds."""
    if not isinstance(statement, ast.Assign):
        return None
    target = statement.targets[0]
    if isinstance(target, ast.Tuple):
        target = target.elts[0]
    return _variable(target)


def _sample(call: ast.Call, bound: str | None) -> str | None:
    """The variable that a call of `step` takes as its sample.

    Schedulers differ in where their samples stand: it is the argument that the result is
    bound to again, or else the third.
    """
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if "sample" in given:
        return _variable(given["sample"])
    places = [_variable(argument) for argument in call.args]
    if bound is not None and bound in places:
        return bound
    return places[2] if len(places) > 2 else None


def _variable(node: ast.expr) -> str | None:
    """The variable behind a cast or a slice of it."""
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None
