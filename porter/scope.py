"""Which names a piece of code reads and writes, by the scoping rules of one frame.

Nested functions, lambdas and comprehensions keep their own names to themselves; what
they read from outside counts as read.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence

import libcst as cst

from porter.parsed import ParsedModule

_OWN_SCOPE = (
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
    ast.Lambda,
    ast.FunctionDef,
)


def to_ast(module: ParsedModule, node: cst.CSTNode) -> list[ast.stmt]:
    """A statement or an expression of the tree as `ast` statements."""
    source = module.source(node)
    if isinstance(node, cst.SimpleStatementLine | cst.BaseCompoundStatement):
        indentation = module.indentation(node)
        if not indentation:
            return ast.parse(source).body
        holder = ast.parse(f"if True:\n{indentation}{source}").body[0]
        assert isinstance(holder, ast.If)
        return holder.body
    return ast.parse(f"({source})").body


def one_line(module: ParsedModule, node: cst.BaseExpression) -> str:
    """An expression without line breaks or comments."""
    return "\n".join(ast.unparse(part) for part in to_ast(module, node))


def names_in(expression: str) -> set[str]:
    """Names that the text of an expression reads."""
    return _names(ast.parse(expression).body, ast.Load)


def reads(module: ParsedModule, node: cst.CSTNode) -> set[str]:
    """Names that a node reads, at any depth."""
    return _names(to_ast(module, node), ast.Load)


def writes(module: ParsedModule, node: cst.CSTNode) -> set[str]:
    """Names that a node binds in its own frame (a store into `x[...]` is no binding)."""
    return _names(to_ast(module, node), ast.Store)


def carried(module: ParsedModule, statements: Sequence[cst.CSTNode]) -> set[str]:
    """Names that a loop body reads before it has surely written them, and writes."""
    body = [part for statement in statements for part in to_ast(module, statement)]
    return _Flow().exposed(body, set()) & _names(body, ast.Store)


def read_first(module: ParsedModule, statements: Sequence[cst.CSTNode]) -> set[str]:
    """Names that statements read before they have surely written them."""
    body = [part for statement in statements for part in to_ast(module, statement)]
    return _Flow().exposed(body, set())


def _names(nodes: Iterable[ast.AST], kind: type[ast.expr_context]) -> set[str]:
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Name):
            # `x += 1` reads what it writes.
            if isinstance(node.ctx, kind):
                found.add(node.id)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
            found |= _names([node.value], kind)
        elif isinstance(node, _OWN_SCOPE):
            found |= _names_of_scope(node, kind)
        else:
            found |= _names(ast.iter_child_nodes(node), kind)
    return found


def _names_of_scope(node: ast.AST, kind: type[ast.expr_context]) -> set[str]:
    own = {"self"} if isinstance(node, ast.FunctionDef) else set()
    if isinstance(node, ast.FunctionDef) and kind is ast.Store:
        return {node.name}
    if kind is ast.Store:
        return set()
    children = list(ast.iter_child_nodes(node))
    own |= _names(children, ast.Store)
    own |= {arg.arg for arg in ast.walk(node) if isinstance(arg, ast.arg)}
    return _names(children, ast.Load) - own


class _Flow:
    """Follows a body in order and collects what it reads before it is surely written.

    What was written under a test counts as written wherever the same test holds again,
    as long as the names of the test stay as they are.
    """

    def __init__(self) -> None:
        self._under: dict[frozenset[str], set[str]] = {}

    def exposed(self, body: Sequence[ast.stmt], defined: set[str]) -> set[str]:
        """Names read too early; adds to `defined` what the body surely writes."""
        found: set[str] = set()
        for statement in body:
            found |= self._by(statement, defined)
        return found

    def _by(self, statement: ast.stmt, defined: set[str]) -> set[str]:
        if isinstance(statement, ast.If):
            return self._by_if(statement, defined)
        if isinstance(statement, ast.With):
            found = _names(statement.items, ast.Load) - defined
            defined |= _names(statement.items, ast.Store)
            return found | self.exposed(statement.body, defined)
        if isinstance(statement, ast.For | ast.While):
            inside = set(defined)
            if isinstance(statement, ast.For):
                head = statement.iter
                inside |= _names([statement.target], ast.Store)
            else:
                head = statement.test
            found = _names([head], ast.Load) - defined
            found |= self.exposed(statement.body, inside)
            return found | self.exposed(statement.orelse, set(defined))
        found = _names([statement], ast.Load) - defined
        written = _names([statement], ast.Store)
        defined |= written
        self._forget(written)
        return found

    def _by_if(self, statement: ast.If, defined: set[str]) -> set[str]:
        found = _names([statement.test], ast.Load) - defined
        facts = _conjuncts(statement.test)
        known = [names for test, names in self._under.items() if test <= facts]
        then = defined.union(*known)
        other = set(defined)
        found |= self.exposed(statement.body, then)
        found |= self.exposed(statement.orelse, other)
        self._forget(_names([statement], ast.Store) - then)
        self._under[facts] = then - defined
        defined |= then & other
        return found

    def _forget(self, written: set[str]) -> None:
        for test in list(self._under):
            tested = {n for part in test for n in _names([ast.parse(part)], ast.Load)}
            if tested & written:
                del self._under[test]


def _conjuncts(test: ast.expr) -> frozenset[str]:
    parts = (
        test.values
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And)
        else [test]
    )
    return frozenset(ast.unparse(part) for part in parts)
