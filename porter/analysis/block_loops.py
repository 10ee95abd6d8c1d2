"""Finds the loops over transformer blocks in a `forward`.

A block loop is a `for` over a list of blocks of `self`, plain or enumerated, whose body
calls the block.  Gradient checkpointing makes a second call (and, around the loop, a
second loop); it never runs under inference and is recognised by its test.
"""

from __future__ import annotations

from dataclasses import dataclass

import libcst as cst

from porter.errors import Refusal
from porter.parsed import ParsedModule, Statement, walk


@dataclass(frozen=True)
class BlockLoop:
    """A loop over `self.<blocks>`.

    Attributes:
        blocks: attribute name of the block list.
        node: the `for` statement.
        block: name of the loop variable that holds the block.
        call: the statement that calls the block and assigns its results.
        arguments: source of each argument of the call, by keyword or position.
        carried: names that the call assigns.
        reads: names that the body reads, checkpoint branches left out.
        checkpoint: the `if` inside the loop whose first branch is a checkpoint, or None.
        choice: the conditional expression whose first branch is a checkpoint, or None.
        around: the `if` around the loop whose first branch holds its twin, or None.
    """

    blocks: str
    node: cst.For
    block: str
    call: cst.SimpleStatementLine
    arguments: tuple[tuple[str | int, str], ...]
    carried: tuple[str, ...]
    reads: tuple[str, ...]
    checkpoint: cst.If | None
    choice: cst.IfExp | None
    around: cst.If | None


def find_method(
    module: ParsedModule, owner: cst.ClassDef, name: str
) -> cst.FunctionDef:
    """The method `name` that `owner` defines itself.

    Raises:
        Refusal: it does not.
    """
    for statement in owner.body.body:
        if isinstance(statement, cst.FunctionDef) and statement.name.value == name:
            return statement
    raise Refusal(
        f"class {owner.name.value} defines no {name}",
        expected="one of its own",
        where=module.where(owner),
    )


def find_block_loops(
    module: ParsedModule, forward: cst.FunctionDef
) -> tuple[BlockLoop, ...]:
    """All block loops of `forward`, in the order of the text.

    Raises:
        Refusal: a loop calls its block twice, or keeps its result in no plain names.
    """
    loops = []
    for node in walk(forward):
        if isinstance(node, cst.For):
            loop = _read_loop(module, forward, node)
            if loop is not None:
                loops.append(loop)
    return tuple(loops)


def is_checkpoint_test(test: cst.BaseExpression) -> bool:
    """True for a test that asks for gradients: false under inference."""
    return any(
        isinstance(node, cst.Attribute | cst.Name)
        and (node.attr if isinstance(node, cst.Attribute) else node).value
        in ("gradient_checkpointing", "is_grad_enabled")
        for node in walk(test)
    )


def _read_loop(
    module: ParsedModule, forward: cst.FunctionDef, node: cst.For
) -> BlockLoop | None:
    blocks, block = _iterated(node)
    if blocks is None or block is None:
        return None
    checkpoint = _checkpoint_inside(node)
    dead = set(walk(checkpoint.body)) if checkpoint is not None else set()
    calls = [
        call
        for call in walk(node.body)
        if isinstance(call, cst.Call)
        and call not in dead
        and isinstance(call.func, cst.Name)
        and call.func.value == block
    ]
    if not calls:
        return None
    if len(calls) > 1:
        raise Refusal(
            f"{len(calls)} calls of a block in one loop",
            expected="one",
            where=module.where(calls[1]),
        )
    statement = module.statement(calls[0])
    choice = _choice_around(module, calls[0])
    if choice is not None:
        dead |= {*walk(choice.body), *walk(choice.test)}
    carried = _targets(statement, choice or calls[0])
    if carried is None:
        raise Refusal(
            "a block whose result is kept in no plain names",
            expected="names = block(...)",
            where=module.where(calls[0]),
        )
    assert isinstance(statement, cst.SimpleStatementLine)
    return BlockLoop(
        blocks=blocks,
        node=node,
        block=block,
        call=statement,
        arguments=_arguments(module, calls[0]),
        carried=carried,
        reads=_reads(node, dead),
        checkpoint=checkpoint,
        choice=choice,
        around=_checkpoint_around(module, forward, node),
    )


def _iterated(node: cst.For) -> tuple[str | None, str | None]:
    """The block list's name and the block variable of `for ... in ...`."""
    source: cst.BaseExpression = node.iter
    target: cst.BaseExpression = node.target
    if (
        isinstance(source, cst.Call)
        and isinstance(source.func, cst.Name)
        and source.func.value == "enumerate"
        and len(source.args) == 1
        and isinstance(target, cst.Tuple)
        and len(target.elements) == 2
    ):
        source, target = source.args[0].value, target.elements[1].value
    if (
        isinstance(source, cst.Attribute)
        and isinstance(source.value, cst.Name)
        and source.value.value == "self"
        and isinstance(target, cst.Name)
    ):
        return source.attr.value, target.value
    return None, None


def _checkpoint_inside(node: cst.For) -> cst.If | None:
    for inner in walk(node.body):
        if isinstance(inner, cst.If) and is_checkpoint_test(inner.test):
            return inner
    return None


def _checkpoint_around(
    module: ParsedModule, forward: cst.FunctionDef, node: cst.For
) -> cst.If | None:
    for above in module.ancestors(node):
        if above is forward:
            return None
        if isinstance(above, cst.If) and is_checkpoint_test(above.test):
            return above
    return None


def _choice_around(module: ParsedModule, call: cst.Call) -> cst.IfExp | None:
    above = module.parent(call)
    if isinstance(above, cst.IfExp) and is_checkpoint_test(above.test):
        return above
    return None


def _targets(statement: Statement, value: cst.BaseExpression) -> tuple[str, ...] | None:
    """Names that `statement` assigns `value` to; None for any other form."""
    if not isinstance(statement, cst.SimpleStatementLine) or len(statement.body) != 1:
        return None
    assign = statement.body[0]
    if not isinstance(assign, cst.Assign) or assign.value is not value:
        return None
    if len(assign.targets) != 1:
        return None
    target = assign.targets[0].target
    nodes = (
        [element.value for element in target.elements]
        if isinstance(target, cst.Tuple)
        else [target]
    )
    names = [node.value for node in nodes if isinstance(node, cst.Name)]
    return tuple(names) if len(names) == len(nodes) else None


def _arguments(
    module: ParsedModule, call: cst.Call
) -> tuple[tuple[str | int, str], ...]:
    return tuple(
        (
            argument.keyword.value if argument.keyword else position,
            module.source(argument.value),
        )
        for position, argument in enumerate(call.args)
    )


def _reads(node: cst.For, dead: set[cst.CSTNode]) -> tuple[str, ...]:
    """Names that the body reads, in the order of the text."""
    keywords = {
        argument.keyword
        for argument in walk(node.body)
        if isinstance(argument, cst.Arg)
    }
    attributes = {
        child.attr for child in walk(node.body) if isinstance(child, cst.Attribute)
    }
    names: dict[str, None] = {}
    for child in walk(node.body):
        if (
            isinstance(child, cst.Name)
            and child not in dead
            and child not in keywords
            and child not in attributes
        ):
            names[child.value] = None
    return tuple(names)
