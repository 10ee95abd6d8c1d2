"""An attention processor as its rule sees it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import libcst as cst

from porter.analysis.block_loops import find_method
from porter.errors import Refusal
from porter.parsed import ParsedModule


@dataclass(frozen=True)
class Processor:
    """A processor class and the method that computes the attention.

    Attributes:
        module: the upstream module that defines it.
        class_name: the processor class.
    """

    module: ParsedModule
    class_name: str

    @cached_property
    def method(self) -> cst.FunctionDef:
        """Its `__call__`."""
        owner = self.module.class_def(self.class_name)
        return find_method(self.module, owner, "__call__")

    @property
    def attention(self) -> str:
        """Name of the parameter that holds the attention module.

        Raises:
            Refusal: the method takes no positional argument.
        """
        names = [parameter.name.value for parameter in self.method.params.params]
        if len(names) < 2:
            raise Refusal(
                f"{self.class_name}.__call__ without a parameter for the attention module",
                expected="(self, attn, ...)",
                where=self.module.where(self.method),
            )
        return names[1]
