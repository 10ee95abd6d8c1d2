"""Every rule does on its cases what they say, and every rule has cases."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from porter.errors import PorterError
from porter.rules import attention, pipeline, transformer
from tests.porter.cases import CASES, RULES, read_case, run_case

PATHS = sorted(CASES.glob("*/*.py"))
PACKAGES = (pipeline, transformer, attention)
SECTIONS = {"1", "1.1 step 1", "1.1 step 2", "1.1 step 3", "1.1 step 4", "1.1 step 5"}
SECTIONS |= {"2", "2.1", "2.2", "3", "4"}


def _id(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", PATHS, ids=_id)
def test_case(path: Path) -> None:
    case = read_case(path)
    if case.after is None:
        with pytest.raises(PorterError, match=re.escape(case.error)):
            run_case(case)
        return
    ast.parse(case.after)
    assert run_case(case) == case.after


@pytest.mark.parametrize("rule", list(RULES))
def test_each_rule_has_a_hit_and_cases_it_leaves_alone_or_refuses(rule: str) -> None:
    cases = {path.stem: read_case(path) for path in (CASES / rule).glob("*.py")}
    assert len(cases) >= 3
    assert any(case.after not in (None, case.before) for case in cases.values())
    assert any(name.startswith("near_miss") for name in cases)


def test_case_folders_are_rules() -> None:
    assert {path.parent.name for path in PATHS} <= set(RULES)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_the_tuple_of_rules_is_the_folder(package: object) -> None:
    folder = Path(package.__file__).parent  # type: ignore[attr-defined]
    files = {p.stem for p in folder.glob("*.py")} - {"__init__"}
    assert {rule().id for rule in package.RULES} == files  # type: ignore[attr-defined]


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_each_rule_names_a_section_of_the_manual(rule: type) -> None:
    assert rule.manual in SECTIONS  # type: ignore[attr-defined]
    assert rule.summary  # type: ignore[attr-defined]
