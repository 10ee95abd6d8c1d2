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
    """A function whose graph is rewritten when it is called, and the operations then in it.

    Args:
        call: the function.
        fullgraph: all of it must be one graph.
        for_compiler: as for the compiler, else as where there is none.
    """
    kernels: list[Node] = []

    def backend(module: GraphModule, inputs: Any) -> Callable[..., Any]:
        if for_compiler:
            CodePass()(module.graph)
            module.recompile()
        run = module.forward if for_compiler else rewrite(module, inputs)
        module.graph.lint()
        kernels.extend(
            x for x in module.graph.nodes if "xfuser_kernels" in str(x.target)
        )
        return run

    torch.compiler.reset()
    return torch.compile(call, backend=backend, fullgraph=fullgraph), kernels


def check(
    call: Callable[..., Any], *arguments: Any, for_compiler: bool = True
) -> list[Node]:
    """The operations in the rewritten call, which gives what the call gives."""
    made, kernels = rewritten(call, for_compiler=for_compiler)
    torch.testing.assert_close(made(*arguments), call(*arguments))
    return kernels


def names(kernels: list[Node]) -> list[str]:
    """What the operations are called, in alphabetical order."""
    return sorted(str(kernel.target).split(".")[1] for kernel in kernels)
