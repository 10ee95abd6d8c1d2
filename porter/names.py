"""Names of what is generated, and where each name that a body needs comes from."""

from __future__ import annotations

import ast
import builtins
import functools
import symtable
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from porter.errors import Refusal
from porter.parsed import ParsedModule, syntax_tree

FOLDERS = {
    "pipeline": "pipelines",
    "transformer": "transformers",
    "attention": "attention",
}


def qualified_name(cls: type) -> str:
    """`module.Class` of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


@dataclass(frozen=True)
class Binding:
    """How a module binds one of its global names.

    Attributes:
        external: the import statement, where another package defines the name.
        always: every way through the module binds it.
    """

    external: str
    always: bool


def wrapper_name(kind: str, class_name: str) -> str:
    """`xFuser<Pipeline>`; for the rest `xFuser<Original>Wrapper`, less a last `Model`."""
    if kind == "pipeline":
        return f"xFuser{class_name}"
    return f"xFuser{class_name.removesuffix('Model')}Wrapper"


def output_path(kind: str, module: ParsedModule) -> str:
    """Path of a generated file below the output folder: upstream's file name."""
    return f"{FOLDERS[kind]}/{module.name.rpartition('.')[2]}.py"


@functools.cache
def bindings(module: ParsedModule) -> Mapping[str, Binding]:
    """Every global name that the module binds."""
    body = syntax_tree(module.text).body
    always = _bound_always(body)
    found = {name: Binding("", name in always) for name in _bound(body)}
    for statement in body:
        if isinstance(statement, ast.Import):
            found.update(_external("import ", statement.names))
        elif isinstance(statement, ast.ImportFrom) and not statement.level:
            found.update(_external(f"from {statement.module} import ", statement.names))
    return found


def free_names(method: str, subject: str) -> set[str]:
    """Global names that a method uses, its decorators and annotations included.

    Args:
        method: text of the method(s), indented as in a class.
        subject: the class, for messages.

    Raises:
        Refusal: the body depends on the class it stands in (`super()`, `__name`).
    """
    table = symtable.symtable(f"class _:\n{method}", subject, "exec")
    used = set(_globals(table)) - {"_"}
    if bad := used & {"super", "__class__"}:
        raise Refusal(
            f"{sorted(bad)[0]} in the rewritten method of {subject}",
            expected="a body that means the same in a subclass",
        )
    return used - set(dir(builtins))


def local_names(method: str) -> set[str]:
    """Names that a method binds in its own frame."""
    table = symtable.symtable(f"class _:\n{method}", "method", "exec")
    names: set[str] = set()
    for frame in table.get_children()[0].get_children():
        names |= {s.get_name() for s in frame.get_symbols() if s.is_local()}
    return names


def _globals(table: symtable.SymbolTable) -> Iterator[str]:
    for symbol in table.get_symbols():
        is_module = table.get_type() == "module"
        if symbol.is_referenced() and (symbol.is_global() or is_module):
            yield symbol.get_name()
    for child in table.get_children():
        yield from _globals(child)


def _external(head: str, names: Iterable[ast.alias]) -> dict[str, Binding]:
    found = {}
    for alias in names:
        behind = f" as {alias.asname}" if alias.asname else ""
        name = alias.asname or alias.name.split(".")[0]
        found[name] = Binding(f"{head}{alias.name}{behind}", True)
    return found


def _bound(body: Iterable[ast.stmt]) -> set[str]:
    """Names that statements bind in their own frame, on any way through."""
    names: set[str] = set()
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            names.add(statement.name)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            names |= {a.asname or a.name.split(".")[0] for a in statement.names}
        elif isinstance(statement, ast.If | ast.Try | ast.With | ast.For | ast.While):
            for part in _branches(statement):
                names |= _bound(part)
        else:
            stores = (
                n
                for n in ast.walk(statement)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            )
            names |= {node.id for node in stores}
    return names


def _bound_always(body: Iterable[ast.stmt]) -> set[str]:
    """Names that statements bind on every way through."""
    names: set[str] = set()
    for statement in body:
        if isinstance(statement, ast.If):
            names |= _bound_always(statement.body) & _bound_always(statement.orelse)
        elif isinstance(statement, ast.Try):
            ways = [_bound_always([*statement.body, *statement.orelse])]
            ways += [_bound_always(handler.body) for handler in statement.handlers]
            names |= set.intersection(*ways) | _bound_always(statement.finalbody)
        elif isinstance(statement, ast.With):
            names |= _bound_always(statement.body)
        elif not isinstance(statement, ast.For | ast.While):
            names |= _bound([statement])
    return names


def _branches(statement: ast.stmt) -> Iterator[list[ast.stmt]]:
    for field in ("body", "orelse", "finalbody"):
        yield getattr(statement, field, [])
    for handler in getattr(statement, "handlers", []):
        yield handler.body
