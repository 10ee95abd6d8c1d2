"""Reads a pipeline's `__call__`: the denoising loop and what stands around it.

Everything is found by structure: the loop is the innermost one that both calls a denoiser
(a parameter of `__init__` that holds a transformer, or a local alias of it) and steps a
scheduler; the latents are what the scheduler's step returns into and the loop carries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import libcst as cst

from porter.analysis.denoising import DenoisingLoop, TransformerCall
from porter.analysis.jumps import sorted_jumps, statements
from porter.analysis.latents import carried_latents, scheduler_steps
from porter.analysis.patches import unfit_for_patches
from porter.analysis.pipeline_modes import cfg_style, unfit_for_passes
from porter.errors import Refusal
from porter.parsed import ParsedModule, Statement, dotted, find
from porter.scope import one_line, reads

CALLBACKS = ("callback", "callback_on_step_end")


@dataclass(frozen=True)
class PipelineSource:
    """A pipeline class as its source shows it.

    Attributes:
        module: the file.
        class_name: the class.
        call: its `__call__`.
        parameters: names of `__call__`'s parameters.
        denoising: the loop, or None where `__call__` has none to follow.
        outer: the statement of `__call__`'s own body that denoises: the one that holds the
            loop, or the last that leads to a transformer call; None where none is seen.
        denoisers: dotted names under which `__call__` calls a transformer.
        cfg_style: "batched" (one call), "sequential" (two), "entries" (one for each entry
            of a guider) or "none": what the source admits; whether guidance is there at
            all is for the probe to say.
        refused_modes: mode to the reason, with file:line, why this port lacks it. A loop
            that cannot be cut into passes stays upstream's: that refuses `pp` and
            `pipefusion`, while sharding and guidance need the transformer call alone.
    """

    module: ParsedModule
    class_name: str
    call: cst.FunctionDef
    parameters: tuple[str, ...]
    denoising: DenoisingLoop | None
    outer: Statement | None
    denoisers: frozenset[str]
    cfg_style: str
    refused_modes: Mapping[str, str]

    @property
    def body(self) -> Sequence[Statement]:
        """The statements of `__call__`."""
        return statements(self.call.body)

    @property
    def before(self) -> Sequence[Statement]:
        """The statements of `__call__` above the one that denoises."""
        body = list(self.body)
        return [] if self.outer is None else body[: body.index(self.outer)]

    @property
    def after(self) -> Sequence[Statement]:
        """The statements of `__call__` below the one that denoises."""
        body = list(self.body)
        return [] if self.outer is None else body[body.index(self.outer) + 1 :]

    @property
    def where(self) -> str:
        """`file:line` of the loop, or of `__call__` where it has none."""
        loop = self.denoising.loop if self.denoising else self.call
        return self.module.where(loop)

    @property
    def rewritten_loop(self) -> DenoisingLoop | None:
        """The loop if it is cut into passes; None where it stays upstream's."""
        return None if "pp" in self.refused_modes else self.denoising


def analyse_pipeline(
    module: ParsedModule, class_name: str, denoisers: Iterable[str]
) -> PipelineSource:
    """Reads one pipeline class.

    Args:
        module: its file.
        class_name: the class.
        denoisers: attributes that hold a transformer.

    Raises:
        Refusal: no transformer, no `__call__` of its own, or no plain denoising loop.
    """
    where = module.where(module.class_def(class_name))
    attributes = {f"self.{name}" for name in denoisers}
    if not attributes:
        raise Refusal(
            f"{class_name} has no transformer among the parameters of __init__",
            expected="a pipeline that denoises with a transformer",
            where=where,
        )
    call = module.method(class_name, "__call__")
    if call is None:
        raise Refusal(
            f"{class_name} has no __call__ of its own",
            expected="a pipeline class that defines __call__",
            where=where,
        )
    known = frozenset(attributes | _aliases(module, call, attributes))
    loop, reason = _denoising_loop(module, class_name, call, known)
    refused = dict.fromkeys(("pp", "pipefusion"), reason) if reason else {}
    style, no_cfg = "none", reason
    if loop is not None and loop.latents:
        style, no_cfg = cfg_style(module, loop)
    if no_cfg:
        refused["cfg"] = no_cfg
    if loop is not None and not reason and (unfit := unfit_for_patches(module, loop)):
        refused["pipefusion"] = unfit
    names = tuple(
        param.name.value for param in (*call.params.params, *call.params.kwonly_params)
    )
    outer = loop.outer if loop else _last_leading(module, class_name, call, known)
    return PipelineSource(
        module, class_name, call, names, loop, outer, known, style, refused
    )


def _denoising_loop(
    module: ParsedModule,
    class_name: str,
    call: cst.FunctionDef,
    denoisers: frozenset[str],
) -> tuple[DenoisingLoop | None, str]:
    """The loop, and the reason why it must stay as it is (or '')."""
    calls = [node for node in find(call, cst.Call) if dotted(node.func) in denoisers]
    loops = {
        loop: None
        for node in calls
        if (loop := _stepping_loop(module, call, node)) is not None
    }
    if not loops:
        return None, (
            f"{module.where(call)}: {class_name}.__call__ has no loop that calls the"
            " transformer and steps the scheduler"
        )
    if len(loops) > 1:
        where = module.where(list(loops)[1])
        return None, f"{where}: {class_name}.__call__ has {len(loops)} denoising loops"
    loop = next(iter(loops))
    outer = _child_of(module, call.body, loop)
    found = _dissect(module, loop, outer, calls)
    return found, unfit_for_passes(module, found)


def _last_leading(
    module: ParsedModule,
    class_name: str,
    call: cst.FunctionDef,
    denoisers: frozenset[str],
) -> Statement | None:
    """The last statement of `__call__` that calls a denoiser, itself or by a method."""
    leading = set(denoisers)
    methods = [
        node
        for node in module.class_def(class_name).body.body
        if isinstance(node, cst.FunctionDef) and node is not call
    ]
    while True:
        more = {
            f"self.{method.name.value}"
            for method in methods
            if any(dotted(node.func) in leading for node in find(method, cst.Call))
        }
        if more <= leading:
            break
        leading |= more
    found = None
    for part in statements(call.body):
        if any(dotted(node.func) in leading for node in find(part, cst.Call)):
            found = part
    return found


def _dissect(
    module: ParsedModule,
    loop: cst.For,
    outer: Statement,
    calls: Sequence[cst.Call],
) -> DenoisingLoop:
    body = statements(loop.body)
    interrupt = _interrupt(module, body)
    stepping = max(i for i, part in enumerate(body) if scheduler_steps(module, part))
    cut = next(
        (i for i, s in enumerate(body) if i > stepping and _is_tail(module, s)),
        len(body),
    )
    inside = tuple(body[1 if interrupt else 0 : cut])
    latents, in_place = carried_latents(module, loop, inside)
    jumps: list[cst.Continue | cst.Break] = []
    for jump in (*find(loop.body, cst.Continue), *find(loop.body, cst.Break)):
        inside_check = interrupt is not None and interrupt in module.ancestors(jump)
        mine = not inside_check and _innermost_loop(module, jump) is loop
        if mine and isinstance(jump, cst.Continue | cst.Break):
            jumps.append(jump)
    kinds = sorted_jumps(module, jumps, inside, body[cut:], latents)
    frame: Statement = loop
    for above in module.ancestors(loop):
        if isinstance(above, cst.With) and loop in statements(above.body):
            frame = above
        if isinstance(above, cst.With | cst.FunctionDef):
            break
    blocks = [s for s in body[cut:] if isinstance(s, cst.If)]
    callback = next(
        (s for s in blocks if "callback_on_step_end" in reads(module, s.test)), None
    )
    return DenoisingLoop(
        loop=loop,
        frame=frame,
        outer=outer,
        body=inside,
        interrupt=interrupt,
        tail=tuple(body[cut:]),
        callback_block=callback,
        latents=latents,
        in_place=in_place,
        calls=tuple(
            _transformer_call(module, node, loop)
            for node in calls
            if loop in module.ancestors(node)
        ),
        skips=kinds.skips,
        stops=kinds.stops,
        other_jumps=kinds.others,
        around=_innermost_loop(module, loop),
    )


def _aliases(
    module: ParsedModule, call: cst.FunctionDef, attributes: set[str]
) -> set[str]:
    """Local names that are bound to a denoiser, such as `model = self.transformer`."""
    found: set[str] = set()
    for node in find(call, cst.Assign):
        value = node.value
        options = [value]
        if isinstance(value, cst.IfExp):
            options = [value.body, value.orelse]
        if any(dotted(option) in attributes for option in options):
            found |= {dotted(target.target) for target in node.targets}
    return found - {""}


def _between(
    module: ParsedModule, node: cst.CSTNode, top: cst.CSTNode
) -> list[cst.CSTNode]:
    above: list[cst.CSTNode] = []
    for each in module.ancestors(node):
        if each is top:
            break
        above.append(each)
    return above


def _child_of(
    module: ParsedModule, block: cst.BaseSuite, node: cst.CSTNode
) -> Statement:
    inside = {node, *module.ancestors(node)}
    return next(part for part in statements(block) if part in inside)


def _innermost_loop(
    module: ParsedModule, node: cst.CSTNode
) -> cst.For | cst.While | None:
    for above in module.ancestors(node):
        if isinstance(above, cst.For | cst.While):
            return above
        if isinstance(above, cst.FunctionDef):
            break
    return None


def _stepping_loop(
    module: ParsedModule, call: cst.FunctionDef, node: cst.CSTNode
) -> cst.For | None:
    for above in _between(module, node, call):
        if isinstance(above, cst.For) and scheduler_steps(module, above):
            return above
    return None


def _interrupt(module: ParsedModule, body: Sequence[Statement]) -> cst.If | None:
    first = body[0]
    if isinstance(first, cst.If) and "interrupt" in module.source(first.test):
        inner = statements(first.body)
        jump = inner[0].body[0] if isinstance(inner[0], cst.SimpleStatementLine) else 0
        if len(inner) == 1 and isinstance(jump, cst.Continue | cst.Break):
            return first
    return None


def _is_tail(module: ParsedModule, statement: Statement) -> bool:
    """Whether a statement serves the step as a whole: callback, progress, device mark."""
    if isinstance(statement, cst.If):
        tested = reads(module, statement.test)
        if tested & {*CALLBACKS, "XLA_AVAILABLE"}:
            return True
    return any(
        isinstance(node.func, cst.Attribute)
        and node.func.attr.value == "update"
        and "progress" in dotted(node.func.value)
        for node in find(statement, cst.Call)
    )


def _transformer_call(
    module: ParsedModule, call: cst.Call, loop: cst.For
) -> TransformerCall:
    statement = module.statement(call)
    above = _between(module, call, loop)
    if not isinstance(statement, cst.SimpleStatementLine):
        raise Refusal(
            "a transformer call in the header of a compound statement",
            expected="a statement of its own",
            where=module.where(call),
        )
    guards = []
    below: cst.CSTNode = call
    for each in above:
        if isinstance(each, cst.If):
            test = one_line(module, each.test)
            guards.append(test if below is each.body else f"not ({test})")
        below = each
    bound = [
        dotted(target.target)
        for node in find(statement, cst.Assign)
        for target in node.targets
    ]
    return TransformerCall(
        call=call,
        statement=statement,
        guards=tuple(reversed(guards)),
        target=bound[0] if len(bound) == 1 and bound[0] else None,
        inner_loop=any(isinstance(each, cst.For | cst.While) for each in above),
    )
