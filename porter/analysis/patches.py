"""Whether a pass over one patch equals its part of a pass over the whole latents.

Between two steps a loop may carry the latents alone, which every pass takes over for its
own rows, and what the scheduler keeps and gets back (its wrapper keeps that by patch).
Formulas that look at all rows of the latents at once admit no patches: the port refuses
them when it meets them, since most stand under a switch that is off.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

import libcst as cst

from porter.analysis.denoising import DenoisingLoop
from porter.analysis.guider import guider_loop
from porter.parsed import ParsedModule, dotted, find, syntax_tree
from porter.scope import carried, names_in, one_line, read_first, reads, writes

_DRAWS = ("randn_tensor", "torch.randn", "torch.randn_like", "torch.rand")
_DRAWS_OF_TENSORS = ("normal_", "uniform_", "multinomial")
_REDUCTIONS = frozenset({"std", "var", "mean", "norm", "vector_norm", "std_mean"})


@dataclass(frozen=True)
class CrossRowFormula:
    """A formula that makes each row of the latents depend on the others.

    Attributes:
        statement: the statement that holds it.
        call: what it calls, such as `noise_pred.std`.
    """

    statement: cst.SimpleStatementLine
    call: str


def cross_row_formulas(
    module: ParsedModule, loop: DenoisingLoop
) -> list[CrossRowFormula]:
    """Statistics over whole latents in a step, one a statement, in order.

    A statistic over the last dimension alone keeps rows apart: it is that of the channels
    of packed latents, or of the width.  One that only another such formula reads does no
    harm without it.
    """
    helpers = _reducing_functions(module)
    found: dict[cst.CSTNode, CrossRowFormula] = {}
    for part in loop.body:
        for call in find(part, cst.Call):
            name = dotted(call.func)
            reduces = name.rpartition(".")[2] in _REDUCTIONS and "." in name
            if name in helpers or (reduces and not _over_last_dimension(call)):
                statement = module.statement(call)
                if isinstance(statement, cst.SimpleStatementLine):
                    found.setdefault(statement, CrossRowFormula(statement, name))
    lines = [line for part in loop.body for line in _simple(part)]
    for formula in list(found.values()):
        statement = formula.statement
        readers = {
            line for line in lines if reads(module, line) & writes(module, statement)
        }
        if readers and readers <= found.keys() - {statement}:
            del found[statement]
    return list(found.values())


def unfit_for_patches(module: ParsedModule, loop: DenoisingLoop) -> str:
    """Why a pass over one patch would not equal its part of a whole pass, or ''."""
    if len(loop.latents) > 1:
        found = ", ".join(loop.latents)
        where = module.where(loop.loop)
        return f"{where}: the loop carries {found} through the scheduler's step"
    calls = [call for call in loop.calls if call.inner_loop]
    if calls and guider_loop(module, loop) is None:
        where = module.where(calls[0].call)
        return f"{where}: the transformer is called in a loop of its own"
    for name in sorted(carried(module, loop.body) - {*loop.latents}):
        if not _keeps_its_value(module, loop, name):
            line = next(s for s in loop.body if name in reads(module, s))
            return f"{module.where(line)}: {name} is carried from step to step"
    if kept := _kept_object(module, loop) or _set_scheduler(module, loop):
        return kept
    early = read_first(module, loop.body)
    written = {name for part in loop.body for name in writes(module, part)}
    for part in loop.body:
        for node in find(part, cst.Call):
            name = dotted(node.func)
            if name in _DRAWS or name.rpartition(".")[2] in _DRAWS_OF_TENSORS:
                return f"{module.where(node)}: random numbers are drawn in the loop"
            if name.endswith(".append") and name.rpartition(".")[0] in early:
                return f"{module.where(node)}: {name.rpartition('.')[0]} grows from step to step"
        for store in find(part, cst.Assign):
            for name in _stored_into(store) & (early - {*loop.latents}):
                if reads(module, store.value) & written:
                    return f"{module.where(store)}: {name} is changed from step to step"
    for part in loop.tail:
        if part is not loop.callback_block and {*loop.latents} & writes(module, part):
            return f"{module.where(part)}: latents change after the step's callback"
    return ""


def _kept_object(module: ParsedModule, loop: DenoisingLoop) -> str:
    """Where a formula gets an object from before the loop that may remember steps, or ''.

    Such as a buffer of momentum: `buffer = MomentumBuffer(...)` above the loop, and
    `guide(prediction, buffer)` in it.  What the transformer gets is its own matter.
    """
    function = next(
        node
        for node in module.ancestors(loop.loop)
        if isinstance(node, cst.FunctionDef)
    )
    inside = set(find(loop.loop, cst.Assign))
    kept = {
        dotted(assign.targets[0].target)
        for assign in find(function.body, cst.Assign)
        if assign not in inside
        for call in find(assign.value, cst.Call)
        if isinstance(call.func, cst.Name) and call.func.value[:1].isupper()
    } - {""}
    of_transformers = {call.call for call in loop.calls}
    for part in loop.body:
        for call in find(part, cst.Call):
            names = {dotted(argument.value) for argument in call.args}
            if call not in of_transformers and names & kept:
                name = sorted(names & kept)[0]
                return f"{module.where(call)}: {name} may remember earlier steps"
    return ""


def _set_scheduler(module: ParsedModule, loop: DenoisingLoop) -> str:
    """Where the body sets something of the scheduler itself, or ''.

    Such as its counter, to step twice at one timestep: patches have a scheduler each.
    """
    for part in loop.body:
        for target in (
            *(store.target for store in find(part, cst.AssignTarget)),
            *(store.target for store in find(part, cst.AugAssign)),
        ):
            name = module.source(target)
            if "scheduler" in name.split(".")[:-1]:
                return f"{module.where(target)}: {name} is set in the loop"
    return ""


def _reducing_functions(module: ParsedModule) -> set[str]:
    """Functions of the file that compute a statistic over more than one dimension."""
    return {
        node.name
        for node in syntax_tree(module.text).body
        if isinstance(node, ast.FunctionDef)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Call)
        and isinstance(inner.func, ast.Attribute)
        and inner.func.attr in _REDUCTIONS
    }


def _over_last_dimension(call: cst.Call) -> bool:
    return any(
        argument.keyword is not None
        and argument.keyword.value == "dim"
        and isinstance(argument.value, cst.UnaryOperation)
        and isinstance(argument.value.operator, cst.Minus)
        and isinstance(argument.value.expression, cst.Integer)
        and argument.value.expression.value == "1"
        for argument in call.args
    )


def _keeps_its_value(module: ParsedModule, loop: DenoisingLoop, name: str) -> bool:
    """Whether a name that seems to be carried does no harm to patches."""
    lines = [line for part in loop.body for line in _simple(part)]
    reading = [line for line in lines if name in reads(module, line)]
    writing = [line for line in lines if name in writes(module, line)]
    refused = {found.statement for found in cross_row_formulas(module, loop)}
    if set(reading) <= refused:
        return True  # read in whole passes alone
    if all(_is_step(line) for line in writing) and set(reading) <= set(writing):
        return True  # the scheduler's own history
    if max(map(module.line, writing)) >= min(map(module.line, reading)):
        return False
    return not _bound_outside(module, loop, name) and all(
        _is_written_alike(module, loop, line) for line in writing
    )


def _simple(part: cst.CSTNode) -> Iterator[cst.SimpleStatementLine]:
    yield from find(part, cst.SimpleStatementLine)


def _is_step(line: cst.SimpleStatementLine) -> bool:
    """`x, y = self.scheduler.step(...)`."""
    if len(line.body) != 1 or not isinstance(line.body[0], cst.Assign):
        return False
    assign = line.body[0]
    return (
        isinstance(assign.value, cst.Call)
        and dotted(assign.value.func).endswith("scheduler.step")
        and isinstance(assign.targets[0].target, cst.Tuple)
    )


def _bound_outside(module: ParsedModule, loop: DenoisingLoop, name: str) -> bool:
    """Whether `__call__` binds a name before the loop (parameters included)."""
    above = module.ancestors(loop.loop)
    function = next(node for node in above if isinstance(node, cst.FunctionDef))
    if any(param.name.value == name for param in find(function.params, cst.Param)):
        return True
    inside = set(find(loop.loop, cst.SimpleStatementLine))
    return any(
        name in writes(module, line)
        for line in find(function.body, cst.SimpleStatementLine)
        if line not in inside
    )


def _is_written_alike(
    module: ParsedModule, loop: DenoisingLoop, line: cst.SimpleStatementLine
) -> bool:
    """Whether a statement of the body runs in every step or in none.

    With no value from before the loop, a step that did not write it could not read it.
    """
    written = {name for part in loop.body for name in writes(module, part)}
    for above in module.ancestors(line):
        if above is loop.loop:
            return True
        if isinstance(above, cst.For | cst.While):
            return False
        if isinstance(above, cst.If):
            test = one_line(module, above.test)
            if names_in(test) & written or "." in test or "(" in test:
                return False
    return False


def _stored_into(assign: cst.Assign) -> set[str]:
    """Names of the tensors and lists that `x[...] = ...` changes in place."""
    return {
        dotted(target.target.value)
        for target in assign.targets
        if isinstance(target.target, cst.Subscript)
    }
