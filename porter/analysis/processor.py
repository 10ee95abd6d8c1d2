"""An attention processor as its rule sees it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import libcst as cst

from porter.analysis.block_loops import find_method
from porter.errors import Refusal
from porter.parsed import ParsedModule, walk

_CONTRACTIONS = ("matmul", "bmm", "einsum", "sum")


@dataclass(frozen=True)
class Processor:
    """A processor class and the method that computes the attention.

    Attributes:
        module: the upstream module that defines it.
        class_name: the processor class.
        token_sums: source of its expressions that sum over tokens.
        scales: whether its softmax scale follows the number of tokens.
        selects: whether it takes the tokens alone that a mask marks.
        pads: whether it pads a mask of all keys by the number of its own tokens.
    """

    module: ParsedModule
    class_name: str
    token_sums: tuple[str, ...] = ()
    scales: bool = False
    selects: bool = False
    pads: bool = False

    @cached_property
    def method(self) -> cst.FunctionDef:
        """Its `__call__`."""
        owner = self.module.class_def(self.class_name)
        return find_method(self.module, owner, "__call__")

    @cached_property
    def contractions(self) -> tuple[cst.BaseExpression, ...]:
        """Expressions that may sum over tokens: matrix products, einsums and sums."""
        return tuple(
            node
            for node in walk(self.method.body)
            if (
                isinstance(node, cst.Call)
                and isinstance(node.func, cst.Attribute)
                and node.func.attr.value in _CONTRACTIONS
            )
            or (
                isinstance(node, cst.BinaryOperation)
                and isinstance(node.operator, cst.MatrixMultiply)
            )
        )

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
