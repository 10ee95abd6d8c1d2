"""The engine: one pass over the original, nothing lost, clashes refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import libcst as cst
import pytest

from porter.errors import PorterError, RuleError
from porter.parsed import ParsedModule, find
from porter.rules.base import Edit, Rule
from porter.rules.engine import Rewrite, apply_rules

SOURCE = '''class A:
    @first
    def f(self, x):
        """Doc.

        Text."""
        # above y
        y = g(x,
            1)
        for i in x:
            # in the loop
            y = h(i)  # kept

        # output
        if y:
            z = """a
b"""
        return z  # last
'''


class Scripted(Rule[Any]):
    """A rule whose edits a test writes down."""

    manual = "1"
    summary = "what the test says"

    def __init__(
        self, script: Callable[[Rule[Any], ParsedModule, Any], Sequence[Edit]]
    ) -> None:
        self._script = script

    def edits(self, module: ParsedModule, facts: Any) -> Sequence[Edit]:
        """The test's edits."""
        return self._script(self, module, facts)


def run(*scripts: Callable[[Any, ParsedModule, Any], Sequence[Edit]]) -> str:
    """The method after the scripts, which get the rule, module and its statements."""
    module = ParsedModule("m", "m.py", SOURCE)
    return rewrite(module, *scripts).text(method(module))


def method(module: ParsedModule) -> cst.FunctionDef:
    """The one method."""
    found = module.method("A", "f")
    assert found is not None
    return found


def rewrite(module: ParsedModule, *scripts: Any) -> Rewrite:
    """The rewrite of the one method."""
    function = method(module)
    rules = [Scripted(script) for script in scripts]
    return apply_rules(
        module, rules, function.body.body, subject="A", within=[function]
    )


def test_all_kinds_of_edits_meet_in_one_pass() -> None:
    def script(rule: Rule[Any], module: ParsedModule, body: Any) -> list[Edit]:
        _, assign, loop, condition, last = body
        return [
            rule.insert_before(module, assign, "n=1", at=loop, blank=True),
            rule.replace(module, next(find(assign, cst.Call)).func, "w(g)", at=loop),
            rule.replace_header(module, loop, "for i in chain(x,y):"),
            rule.insert_after(module, loop.body.body[0], "y=commit(y)", at=loop),
            rule.nest(
                module,
                condition,
                last,
                header="if last():",
                footer="else:\n    return None",
                at=loop,
            ),
            rule.insert_before(module, last, "k=2", at=loop),
        ]

    assert run(script) == '''    @first
    def f(self, x):
        """Doc.

        Text."""
        n = 1

        # above y
        y = w(g)(x,
            1)
        for i in chain(x, y):
            # in the loop
            y = h(i)  # kept
            y = commit(y)

        # output
        if last():
            if y:
                z = """a
b"""
            k = 2
            return z  # last
        else:
            return None
'''


def test_without_edits_the_text_is_upstreams() -> None:
    module = ParsedModule("m", "m.py", SOURCE)
    script = lambda rule, module, body: [  # noqa: E731
        rule.insert_after(module, body[-1], "pass")
    ]
    text = rewrite(module, script).text(method(module))
    assert text.removesuffix("        pass\n") == SOURCE.removeprefix("class A:\n")


def test_a_long_statement_is_formatted_and_no_other() -> None:
    name = "a" * 120

    def script(rule: Rule[Any], module: ParsedModule, body: Any) -> list[Edit]:
        return [rule.replace(module, next(find(body[2].body, cst.Call)).args[0], name)]

    text = run(script)
    assert f"            y = h(\n                {name}\n            )  # kept" in text
    assert "        y = g(x,\n            1)" in text


def test_overlapping_edits_are_refused_with_both_rules() -> None:
    def script(rule: Rule[Any], module: ParsedModule, body: Any) -> list[Edit]:
        return [
            rule.replace(module, body[1], "y = 1"),
            rule.replace(module, body[1], "y = 2"),
        ]

    with pytest.raises(RuleError, match="overlap"):
        run(script)


def test_a_nest_that_cuts_a_statement_is_refused() -> None:
    def script(rule: Rule[Any], module: ParsedModule, body: Any) -> list[Edit]:
        return [
            rule.nest(module, body[1], body[2], header="if a:", at=body[1]),
            rule.nest(module, body[2], body[3], header="if b:", at=body[1]),
        ]

    with pytest.raises(RuleError, match="overlap"):
        run(script)


@pytest.mark.parametrize("count", [0, 2])
def test_another_number_of_matches_is_refused_with_its_line(count: int) -> None:
    def script(rule: Rule[Any], module: ParsedModule, body: Any) -> list[Edit]:
        return [
            rule.insert_before(module, part, "pass") for part in body[1 : 1 + count]
        ]

    with pytest.raises(RuleError, match=rf"m\.py:\d+: .*{count} matches, expected 1"):
        run(script)


def test_edits_of_one_match_count_once() -> None:
    def script(rule: Rule[Any], module: ParsedModule, body: Any) -> list[Edit]:
        return [rule.insert_before(module, p, "pass", at=body[0]) for p in body[1:]]

    module = ParsedModule("m", "m.py", SOURCE)
    assert list(rewrite(module, script).counts.values()) == [1]


def test_a_lost_comment_is_refused() -> None:
    def script(rule: Rule[Any], module: ParsedModule, body: Any) -> list[Edit]:
        return [rule.remove(module, body[2])]

    with pytest.raises(RuleError, match="# in the loop|# kept"):
        run(script)


def test_an_edit_outside_the_method_is_refused() -> None:
    module = ParsedModule("m", "m.py", SOURCE + "\n\nother = 1\n")

    def script(rule: Rule[Any], module: ParsedModule, body: Any) -> list[Edit]:
        return [rule.replace(module, module.tree.body[1], "other = 2")]

    with pytest.raises(RuleError, match="outside"):
        rewrite(module, script)


def test_emitted_text_that_is_no_python_is_a_fault() -> None:
    def script(rule: Rule[Any], module: ParsedModule, body: Any) -> list[Edit]:
        return [rule.insert_before(module, body[1], "if:")]

    with pytest.raises(PorterError, match="no Python"):
        run(script)
