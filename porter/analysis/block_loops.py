"""Finds the loops over transformer blocks in a `forward`.

A block loop is a `for` over a list of blocks of `self`, or over several in step, plain or
enumerated, whose body calls the block.  Gradient checkpointing makes a second call (and, around the loop, a
second loop); it never runs under inference and is recognised by its test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

import libcst as cst

from porter.errors import Refusal
from porter.parsed import ParsedModule, Statement, dotted, find, walk
from porter.scope import carried, read_first, reads, writes

_FILLS = ("append", "extend", "insert", "pop")


@dataclass(frozen=True)
class BlockCall:
    """One call of a block.

    Attributes:
        statement: the statement that makes the call and assigns its results.
        results: the names that it assigns.
        choice: the conditional expression whose first branch is a checkpoint, or None.
    """

    statement: cst.SimpleStatementLine
    results: tuple[str, ...]
    choice: cst.IfExp | None


@dataclass(frozen=True)
class BlockLoop:
    """A loop over `self.<blocks>`.

    Attributes:
        blocks: attribute name of the block list.
        companions: attribute names of the lists that it runs over in step.
        node: the `for` statement.
        block: name of the loop variable that holds the block.
        calls: the calls of the block, and of the companions', of which one iteration makes
            one each.
        arguments: names that the calls hand to the block.
        results: names that the calls assign.
        used: those of them that other statements of the body read.
        carried: these, and the names that an iteration hands on to the next.
        filled: names of lists that the body puts values into or takes them from.
        later: names that the body makes or fills, it does not carry and code after it reads.
        alive: names that code after it reads.
        reads: names whose value from before the loop the body reads, checkpoint branches
            left out.
        checkpoints: the `if`s inside the loop whose first branch is a checkpoint.
        around: the `if` around the loop whose first branch holds its twin, or None.
    """

    blocks: str
    companions: tuple[str, ...]
    node: cst.For
    block: str
    calls: tuple[BlockCall, ...]
    arguments: frozenset[str]
    results: tuple[str, ...]
    used: tuple[str, ...]
    carried: tuple[str, ...]
    filled: tuple[str, ...]
    later: tuple[str, ...]
    alive: frozenset[str]
    reads: tuple[str, ...]
    checkpoints: tuple[cst.If, ...]
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
        Refusal: an iteration calls its block twice, or keeps its result in no plain names.
    """
    loops = []
    for node in walk(forward):
        if isinstance(node, cst.For):
            loop = _read_loop(module, forward, node)
            if loop is not None:
                loops.append(loop)
    return tuple(loops)


def is_checkpoint_test(module: ParsedModule, test: cst.BaseExpression) -> bool:
    """True for a test that asks for gradients: false under inference.

    It may be a name that the function binds once, to such a test.
    """
    if isinstance(test, cst.Name):
        bound = _bindings(module, test)
        return len(bound) == 1 and is_checkpoint_test(module, bound[0])
    return any(
        isinstance(node, cst.Attribute | cst.Name)
        and (node.attr if isinstance(node, cst.Attribute) else node).value
        in ("gradient_checkpointing", "is_grad_enabled")
        for node in walk(test)
    )


def _bindings(module: ParsedModule, name: cst.Name) -> list[cst.BaseExpression]:
    """What the function around a name assigns to it; nothing where it is a parameter."""
    for above in module.ancestors(name):
        if isinstance(above, cst.FunctionDef):
            parameters = {p.name.value for p in find(above.params, cst.Param)}
            return [
                assign.value
                for assign in find(above.body, cst.Assign)
                for target in assign.targets
                if name.value not in parameters
                and isinstance(target.target, cst.Name)
                and target.target.value == name.value
            ]
    return []


def _read_loop(
    module: ParsedModule, forward: cst.FunctionDef, node: cst.For
) -> BlockLoop | None:
    iterated = _iterated(node)
    checkpoints = _checkpoints_inside(module, node)
    dead = {part for test in checkpoints for part in walk(test.body)}
    calls = [
        call
        for call in find(node.body, cst.Call)
        if call not in dead and dotted(call.func) in iterated.values()
    ]
    if not iterated or {dotted(call.func) for call in calls} != {*iterated.values()}:
        return None
    if any(
        dotted(one.func) == dotted(other.func) and not _exclusive(module, one, other)
        for i, one in enumerate(calls)
        for other in calls[:i]
    ):
        raise Refusal(
            f"{len(calls)} calls of a block in one iteration",
            expected="one, or one in each arm of a test",
            where=module.where(calls[1]),
        )
    found = tuple(_read_call(module, call) for call in calls)
    for call in found:
        if call.choice is not None:
            dead |= {*walk(call.choice.body), *walk(call.choice.test)}
    results = tuple(dict.fromkeys(name for call in found for name in call.results))
    within = {part for call in found for part in walk(call.statement)}
    others = sorted(carried(module, node.body.body) - set(results))
    filled = _filled(node, dead)
    written = set(filled).union(*(writes(module, part) for part in node.body.body))
    first = read_first(module, node.body.body)
    after = read_first(module, module.following(node, forward))
    blocks, *companions = iterated
    return BlockLoop(
        blocks=blocks,
        companions=tuple(companions),
        node=node,
        block=iterated[blocks],
        calls=found,
        arguments=frozenset().union(*(reads(module, call) for call in calls)),
        results=results,
        used=tuple(name for name in _reads(node, dead | within) if name in results),
        carried=(*results, *others),
        filled=filled,
        later=tuple(sorted((written & after) - {*results, *others})),
        alive=frozenset(after),
        reads=tuple(name for name in _reads(node, dead) if name in first),
        checkpoints=checkpoints,
        around=_checkpoint_around(module, forward, node),
    )


def _read_call(module: ParsedModule, call: cst.Call) -> BlockCall:
    """A call with what it assigns.

    Raises:
        Refusal: its results are kept in no plain names.
    """
    statement = module.statement(call)
    choice = _choice_around(module, call)
    results = _targets(statement, choice or call)
    if results is None:
        raise Refusal(
            "a block whose result is kept in no plain names",
            expected="names = block(...)",
            where=module.where(call),
        )
    assert isinstance(statement, cst.SimpleStatementLine)
    return BlockCall(statement, results, choice)


def _exclusive(module: ParsedModule, one: cst.CSTNode, other: cst.CSTNode) -> bool:
    """True when two calls stand in different arms of one `if`."""
    arms = _arms(module, other)
    return any(
        arms.get(test, arm) is not arm for test, arm in _arms(module, one).items()
    )


def _arms(module: ParsedModule, node: cst.CSTNode) -> dict[cst.If, cst.CSTNode]:
    """The arm of every `if` around a node in which it stands."""
    arms: dict[cst.If, cst.CSTNode] = {}
    below = node
    for above in module.ancestors(node):
        if isinstance(above, cst.If) and below is not above.test:
            arms[above] = below
        below = above
    return arms


def _filled(node: cst.For, dead: set[cst.CSTNode]) -> tuple[str, ...]:
    """Names on whose value the body calls a method that changes a list."""
    names = {
        call.func.value.value
        for call in walk(node.body)
        if isinstance(call, cst.Call)
        and call not in dead
        and isinstance(call.func, cst.Attribute)
        and isinstance(call.func.value, cst.Name)
        and call.func.attr.value in _FILLS
    }
    return tuple(sorted(names))


def _iterated(node: cst.For) -> dict[str, str]:
    """The block lists of `for ... in ...`, each with the variable of its blocks."""
    source: cst.BaseExpression = node.iter
    target: cst.BaseExpression = node.target
    if _is_call_of(source, "enumerate") and len(source.args) == 1:
        places = _elements(target)
        if len(places) != 2:
            return {}
        source, target = source.args[0].value, places[1]
    if _is_call_of(source, "zip"):
        sources, targets = [arg.value for arg in source.args], _elements(target)
    else:
        sources, targets = [source], [target]
    found = {
        dotted(each).removeprefix("self."): dotted(variable)
        for each, variable in zip(sources, targets, strict=False)
        if dotted(each).startswith("self.") and dotted(each).count(".") == 1
    }
    whole = len(found) == len(sources) == len(targets) and all(found.values())
    return found if whole else {}


def _is_call_of(node: cst.BaseExpression, name: str) -> TypeGuard[cst.Call]:
    return isinstance(node, cst.Call) and dotted(node.func) == name


def _elements(node: cst.BaseExpression) -> list[cst.BaseExpression]:
    """The places of a tuple, or none."""
    if not isinstance(node, cst.Tuple):
        return []
    return [element.value for element in node.elements]


def _checkpoints_inside(module: ParsedModule, node: cst.For) -> tuple[cst.If, ...]:
    """The outermost of the tests in the body that ask for gradients."""
    found: list[cst.If] = []
    for inner in find(node.body, cst.If):
        inside = any(above in found for above in module.ancestors(inner))
        if not inside and is_checkpoint_test(module, inner.test):
            found.append(inner)
    return tuple(found)


def _checkpoint_around(
    module: ParsedModule, forward: cst.FunctionDef, node: cst.For
) -> cst.If | None:
    for above in module.ancestors(node):
        if above is forward:
            return None
        if isinstance(above, cst.If) and is_checkpoint_test(module, above.test):
            return above
    return None


def _choice_around(module: ParsedModule, call: cst.Call) -> cst.IfExp | None:
    above = module.parent(call)
    if isinstance(above, cst.IfExp) and is_checkpoint_test(module, above.test):
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
