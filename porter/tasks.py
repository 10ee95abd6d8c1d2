"""What a pipeline turns into what, read from its signature and its output class."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache

from porter.source import methods_of, pipeline_nodes, symbol

_MEDIUM = re.compile(r"(?:^|_)(image|video|audio)s?$")
#: First field of an output class that holds a medium, by the field's name.
_FIELDS = {
    "image": "image",
    "images": "image",
    "frames": "video",
    "video": "video",
    "videos": "video",
    "audio": "audio",
    "audios": "audio",
}


@cache
def pipeline_tasks() -> Mapping[str, str]:
    """The task of every class of `pipeline_nodes`, by name."""
    return {name: task_of(*found) for name, found in pipeline_nodes().items()}


def task_of(module: str, node: ast.ClassDef) -> str:
    """The task of a pipeline class, for example `text-to-image`.

    The right side is the first field of the class that `__call__` is annotated to return
    that holds images, frames or audio; `other` without one.

    The left side is the first medium that `__call__` cannot do without, else `text` where
    it takes a prompt or class labels, else `other`. An argument is a medium where its name
    ends in image, video or audio. `__call__` cannot do without it where it has no default;
    and also where its default is None but no code that gets it (input checks apart) ever
    compares it with None, or where `__call__` takes it apart (`image[0]`, `image.size`)
    under no such comparison: an optional picture has a branch for its absence.

    Args:
        module: name of the module that defines the class.
        node: the class.
    """
    methods = methods_of(node)
    call = methods["__call__"]
    defaults = _defaults(call)
    needed = [
        match[1]
        for name, default in defaults.items()
        if (match := _MEDIUM.search(name)) and _is_needed(name, default, methods)
    ]
    conditions = {"prompt", "class_labels"} & defaults.keys()
    source = needed[0] if needed else "text" if conditions else "other"
    return f"{source}-to-{_output(module, call)}"


def needed_arguments(node: ast.ClassDef) -> tuple[str, ...]:
    """Parameters of `__call__` that it cannot do without, by the rule of `task_of`."""
    methods = methods_of(node)
    defaults = _defaults(methods["__call__"])
    return tuple(n for n, value in defaults.items() if _is_needed(n, value, methods))


def _defaults(function: ast.FunctionDef) -> dict[str, ast.expr | None]:
    """Parameters with their defaults; None where there is none."""
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    given = [None] * (len(names) - len(arguments.defaults)) + arguments.defaults
    named = [a.arg for a in arguments.kwonlyargs]
    return dict(zip([*names, *named], [*given, *arguments.kw_defaults], strict=True))


def _is_needed(
    name: str, default: ast.expr | None, methods: Mapping[str, ast.FunctionDef]
) -> bool:
    if default is None:
        return True
    if not (isinstance(default, ast.Constant) and default.value is None):
        return False
    call = methods["__call__"]
    if any(_taken_apart(call.body, name)):
        return True
    receivers = ((methods[m], p) for m, p in _passed_on(call, name, methods))
    return not any(_compares(f, p) for f, p in ((call, name), *receivers))


def _compares(node: ast.AST, name: str) -> bool:
    """Whether code asks if a variable is None."""
    return any(
        isinstance(part, ast.Compare)
        and isinstance(part.left, ast.Name)
        and part.left.id == name
        and isinstance(part.ops[0], ast.Is | ast.IsNot)
        for part in ast.walk(node)
    )


def _taken_apart(nodes: Iterable[ast.AST], name: str) -> Iterator[ast.AST]:
    """Attributes and items of a variable that no comparison with None guards."""
    for node in nodes:
        match node:
            case ast.Attribute(value=ast.Name(id=found)) if found == name:
                yield node
            case ast.Subscript(value=ast.Name(id=found)) if found == name:
                yield node
        if isinstance(node, ast.If | ast.IfExp) and _compares(node.test, name):
            continue
        if isinstance(node, ast.BoolOp) and _compares(node, name):
            continue
        yield from _taken_apart(ast.iter_child_nodes(node), name)


def _passed_on(
    call: ast.FunctionDef, name: str, methods: Mapping[str, ast.FunctionDef]
) -> Iterator[tuple[str, str]]:
    """Methods of the class that get the variable, with the name of their parameter."""
    for node in ast.walk(call):
        if (
            not isinstance(node, ast.Call)
            or not isinstance(node.func, ast.Attribute)
            or node.func.attr not in methods
            or node.func.attr == "check_inputs"
        ):
            continue
        method = node.func.attr
        names = [parameter.arg for parameter in methods[method].args.args]
        names = names[1:] if names[:1] == ["self"] else names
        # Fewer arguments than parameters is the rule.
        given = [
            *zip(names, node.args, strict=False),
            *((k.arg, k.value) for k in node.keywords),
        ]
        for parameter, value in given:
            if isinstance(value, ast.Name) and value.id == name and parameter:
                yield method, parameter


def _output(module: str, call: ast.FunctionDef) -> str:
    """The medium of the first field that has one, of the class in the annotation."""
    names = ast.walk(call.returns) if call.returns else ()
    for name in names:
        found = symbol(module, name.id) if isinstance(name, ast.Name) else None
        for node in ast.walk(ast.parse(found[1])) if found else ():
            match node:
                case ast.AnnAssign(target=ast.Name(id=field)) if field in _FIELDS:
                    return _FIELDS[field]
    return "other"
