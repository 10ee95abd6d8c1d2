"""Blocks with the operations that GPUs get in the place of what their code calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from xfuser_runtime.cuda.passes import CodePass, rewrite


def rewritten(
    call: Callable[..., Any], fullgraph: bool = True, *, for_compiler: bool = True
) -> tuple[Callable[..., Any], list[Node]]:
    """A function whose graph is rewritten when it is called, and the calls then in it.

    Args:
        call: the function.
        fullgraph: all of it must be one graph.
        for_compiler: as for the compiler, else as where there is none.
    """
    calls: list[Node] = []

    def backend(module: GraphModule, inputs: Any) -> Callable[..., Any]:
        if for_compiler:
            CodePass()(module.graph)
            module.recompile()
        unread = unread_in(module)
        run = module.forward if for_compiler else rewrite(module, inputs)
        module.graph.lint()
        # What was replaced goes with all that was made for it alone.
        assert for_compiler or unread_in(module) <= unread
        calls.extend(
            x for x in module.graph.nodes if x.op in ("call_function", "call_method")
        )
        return run

    torch.compiler.reset()
    return torch.compile(call, backend=backend, fullgraph=fullgraph), calls


def unread_in(module: GraphModule) -> set[Node]:
    """The nodes that nobody reads."""
    return {node for node in module.graph.nodes if not node.users}


def check(
    call: Callable[..., Any], *arguments: Any, for_compiler: bool = True
) -> list[Node]:
    """This package's operations in the rewritten call, which gives what the call gives."""
    return kernels_in(calls_of(call, *arguments, for_compiler=for_compiler))


def calls_of(
    call: Callable[..., Any], *arguments: Any, for_compiler: bool = True
) -> list[Node]:
    """All calls in the rewritten call, which gives what the call gives."""
    made, calls = rewritten(call, for_compiler=for_compiler)
    torch.testing.assert_close(made(*arguments), call(*arguments))
    return calls


def kernels_in(calls: list[Node]) -> list[Node]:
    """Those of this package."""
    return [node for node in calls if "xfuser_kernels" in str(node.target)]


def names(kernels: list[Node]) -> list[str]:
    """What the operations are called, in alphabetical order."""
    return sorted(str(kernel.target).split(".")[1] for kernel in kernels)
