"""How guidance may be split over two ranks, and the reason where it may not."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import libcst as cst

from porter.analysis.denoising import DenoisingLoop, TransformerCall
from porter.analysis.guider import guider_loop
from porter.parsed import ParsedModule, find
from porter.scope import names_in, read_first, reads, writes


def cfg_style(module: ParsedModule, loop: DenoisingLoop) -> tuple[str, str]:
    """How guidance could be split, or the reason why it cannot."""
    calls = loop.calls
    where = module.where(calls[-1].call)
    if any(call.inner_loop for call in calls):
        if guider_loop(module, loop) is not None:
            return "entries", ""
        return "none", f"{where}: the transformer is called in a loop of its own"
    if doubled_calls(module, loop):
        return "batched", ""
    if len(calls) > 2:
        return "none", f"{where}: {len(calls)} transformer calls a step"
    first, second = calls
    if first.target is None or second.target is None:
        return "none", f"{where}: the outputs of the two calls are not bound to names"
    if first.target == second.target:
        return "none", f"{where}: both calls end in {first.target}"
    if first.guards != second.guards[: len(first.guards)]:
        return "none", f"{module.where(first.call)}: the first call has its own guard"
    between = _statements_between(module, loop, first, second)
    tainted, rewritten = {first.target}, set(writes(module, first.statement))
    for part in between:
        if reads(module, part) & tainted:
            tainted |= writes(module, part)
        rewritten |= writes(module, part)
    if reads(module, second.call) & tainted:
        return "none", f"{where}: the second call depends on the first"
    tests = second.guards[len(first.guards) :]
    if any(names_in(test) & rewritten for test in tests):
        return "none", f"{where}: its guard is known only after the first call"
    live = live_outputs(module, loop)
    if len(live) != 2:
        named = ", ".join(live)
        return "none", f"{where}: {named} live on after the two calls, expected two"
    return "sequential", ""


def live_outputs(module: ParsedModule, loop: DenoisingLoop) -> tuple[str, ...]:
    """What of two calls the rest of the step reads: the second call's output last.

    Most often the first is what the first call binds; where the code between the calls
    takes its output further, it is the name that this ends in.
    """
    first, second = loop.calls
    assert first.target is not None and second.target is not None
    place = exchange_place(module, loop)
    following = read_first(module, [*_after(module, loop, place), *loop.body])
    live = sorted(_derived(module, loop) & (following - {second.target}))
    return (*(live or [first.target]), second.target)


def exchange_place(
    module: ParsedModule, loop: DenoisingLoop
) -> cst.SimpleStatementLine:
    """The statement behind which both outputs are as the rest of the step reads them.

    That is the second call's, and what cuts its output alone right behind it: code before
    the second call has cut the first output alike.
    """
    first, second = loop.calls
    place = second.statement
    others = _derived(module, loop)
    for part in _after(module, loop, place, through=cst.With):
        if (
            not isinstance(part, cst.SimpleStatementLine)
            or writes(module, part) != {second.target}
            or second.target not in reads(module, part)
            or reads(module, part) & others
        ):
            break
        place = part
    return place


def _derived(module: ParsedModule, loop: DenoisingLoop) -> set[str]:
    """The first call's output, and what is made of it before the second call."""
    first, second = loop.calls
    assert first.target is not None
    derived = {first.target}
    for part in _statements_between(module, loop, first, second):
        if reads(module, part) & derived:
            derived |= writes(module, part)
    return derived


def _after(
    module: ParsedModule,
    loop: DenoisingLoop,
    statement: cst.CSTNode,
    through: type[cst.CSTNode] = cst.BaseCompoundStatement,
) -> list[cst.CSTNode]:
    """The statements that may run after one, up to the end of the loop's body.

    Behind a compound statement around it they count where it is one of ``through``.
    """
    found: list[cst.CSTNode] = []
    below = statement
    for above in module.ancestors(statement):
        if isinstance(above, cst.IndentedBlock):
            parts: list[cst.CSTNode] = list(above.body)
            found += parts[parts.index(below) + 1 :]
        if above is loop.loop:
            break
        if isinstance(above, cst.BaseCompoundStatement):
            if not isinstance(above, through):
                break
            below = above
    return found


def doubled_calls(
    module: ParsedModule, loop: DenoisingLoop
) -> Sequence[TransformerCall]:
    """The calls that may see the guided batch.

    Of several calls in a step they are those whose output is taken apart into halves
    (`.chunk(2)`).  Further calls see one branch alone, as in skip-layer guidance: every
    rank makes them.
    """
    if len(loop.calls) == 1 or _exclusive(module, loop.calls):
        return loop.calls
    halved = _halved(module, loop)
    return tuple(call for call in loop.calls if call.statement in halved)


def _halved(module: ParsedModule, loop: DenoisingLoop) -> set[cst.CSTNode]:
    """Statements of calls whose output is cut in two, with nothing of another call in it."""
    calls = {call.statement for call in loop.calls}
    found: set[cst.CSTNode] = set()
    origins: dict[str, set[cst.CSTNode]] = {}
    for line in find(loop.loop.body, cst.SimpleStatementLine):
        for node in find(line, cst.Call):
            if not isinstance(node.func, cst.Attribute):
                continue
            arguments = [module.source(argument) for argument in node.args]
            if node.func.attr.value == "chunk" and arguments in (["2"], ["2", "dim=0"]):
                names = reads(module, node.func.value)
                made_of = set().union(*(origins.get(name, set()) for name in names))
                found |= made_of if len(made_of) == 1 else set()
        came = set().union(*(origins.get(name, set()) for name in reads(module, line)))
        if line in calls:
            came = {line}
        for name in writes(module, line):
            origins[name] = came
    return found


def _exclusive(module: ParsedModule, calls: Sequence[TransformerCall]) -> bool:
    """Whether at most one of the calls runs in a step."""
    homes = []
    for call in calls:
        below: cst.CSTNode = call.call
        branches = {}
        for above in module.ancestors(call.call):
            if isinstance(above, cst.If):
                branches[above] = below is above.body
            below = above
        homes.append(branches)
    return all(
        any(node in other and other[node] != side for node, side in one.items())
        for i, one in enumerate(homes)
        for other in homes[i + 1 :]
    )


def _statements_between(
    module: ParsedModule,
    loop: DenoisingLoop,
    first: TransformerCall,
    second: TransformerCall,
) -> list[cst.SimpleStatementLine]:
    start, end = module.span(first.statement)[1], module.span(second.statement)[0]
    return [
        part
        for part in find(loop.loop, cst.SimpleStatementLine)
        if start <= module.span(part)[0] < end
    ]


def unfit_for_passes(module: ParsedModule, loop: DenoisingLoop) -> str:
    """Why the loop cannot be cut into passes, which stages need, or ''."""
    where = module.where(loop.loop)
    for name in sorted(_read_behind(module, loop) - {*loop.latents}):
        return f"{where}: {name} of the denoising loop is read in the loop around it"
    if loop.loop.orelse is not None:
        return f"{module.where(loop.loop.orelse)}: the denoising loop has an else"
    if not loop.latents:
        return f"{where}: the loop carries no variable through the scheduler's step"
    for jump in loop.other_jumps:
        return f"{module.where(jump)}: a {module.source(jump)} in the denoising loop"
    return ""


def shared_latents(loop: DenoisingLoop | None, helpers: Collection[str]) -> str:
    """When stages that are not the last need the whole latents.

    Args:
        loop: that is cut into passes, if one is.
        helpers: other models that a step calls on the latents.

    Returns:
        At the end of all "steps", where the helpers read them, of the "loop", where one
        around it goes on with them, or "" for never.
    """
    if loop is None:
        return ""
    around = "loop" if loop.around is not None else ""
    return "steps" if helpers else around


def _read_behind(module: ParsedModule, loop: DenoisingLoop) -> set[str]:
    """What the transformer's output has reached in the loop and the loop around it reads.

    It is right on the last stage alone.
    """
    if loop.around is None:
        return set()
    reached = {call.target for call in loop.calls if call.target is not None}
    for line in (line for part in loop.body for line in _lines(part)):
        if reads(module, line) & reached:
            reached |= writes(module, line)
    around = _statements(loop.around)
    below = next(i for i, part in enumerate(around) if loop.loop in find(part, cst.For))
    return reached & read_first(module, [*around[below + 1 :], *around])


def _lines(part: cst.CSTNode) -> Iterator[cst.SimpleStatementLine]:
    yield from find(part, cst.SimpleStatementLine)


def _statements(loop: cst.For | cst.While) -> list[cst.CSTNode]:
    return list(loop.body.body)
