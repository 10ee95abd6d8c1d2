"""Which names a loop body reads before it has surely written them."""

from __future__ import annotations

import textwrap

import pytest

from porter.parsed import ParsedModule
from porter.scope import carried, reads, writes


def module(body: str) -> ParsedModule:
    return ParsedModule("m", "m.py", textwrap.dedent(body))


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ("x = f(x)", {"x"}),
        ("y = f(x)\nx = y", {"x"}),
        ("y = 1\nx = y", set()),
        ("if a:\n    y = 1\nz = y", {"y"}),
        ("if a:\n    y = 1\nelse:\n    y = 2\nz = y", set()),
        ("if a:\n    y = 1\nif a and b:\n    z = y", set()),
        ("if a:\n    y = 1\na = 2\nif a and b:\n    z = y", {"a", "y"}),
        ("for i in n:\n    y = 1\nz = y", {"y"}),
        ("with c as y:\n    z = y", set()),
        ("n += 1", {"n"}),
        ("x[0] = f(y)", set()),
        ("a = [x for x in b]\nx = 1", set()),
        ("f = lambda q: q + x\nx = 1\nq = 2", {"x"}),
    ],
)
def test_carried(body: str, names: set[str]) -> None:
    parsed = module(body)
    assert carried(parsed, parsed.tree.body) == names


def test_reads_and_writes_of_a_statement() -> None:
    parsed = module("a, b.c, d[e] = f(g, h=i)\n")
    (statement,) = parsed.tree.body
    assert reads(parsed, statement) == {"b", "d", "e", "f", "g", "i"}
    assert writes(parsed, statement) == {"a"}
