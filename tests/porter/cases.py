"""Runs one case of a rule: `tests/cases/<rule>/<case>.py`.

A case is the text before, then `# output` and the text after; without that line the rule
must leave the text alone. `# facts: {...}` on top gives the measured facts as JSON,
`# error: ...` says what the refusal must contain.
"""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libcst as cst

from porter.analysis.facts import PipelineFacts, facts_from_json
from porter.analysis.forward import Forward
from porter.analysis.pipeline_source import analyse_pipeline
from porter.analysis.processor import Processor
from porter.parsed import ParsedModule
from porter.rules import attention, pipeline, transformer
from porter.rules.base import Rule
from porter.rules.context import PipelineContext
from porter.rules.engine import apply_rules

CASES = Path(__file__).parent.parent / "cases"
RULES: dict[str, type[Rule[Any]]] = {
    rule().id: rule
    for package in (pipeline, transformer, attention)
    for rule in package.RULES
}


@dataclass(frozen=True)
class Case:
    """A case as its file says it; `after` is None where an error is expected."""

    rule: str
    before: str
    after: str | None
    error: str
    facts: Any


def read_case(path: Path) -> Case:
    """The case of a file."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    facts, error = None, ""
    while lines[0].startswith(("# facts: ", "# error: ")):
        word, text = lines.pop(0)[2:].rstrip("\n").split(": ", 1)
        facts, error = (json.loads(text), error) if word == "facts" else (facts, text)
    before, _, after = "".join(lines).partition("# output\n")
    return Case(
        path.parent.name, before, None if error else after or before, error, facts
    )


def run_case(case: Case) -> str:
    """The text after the rule alone has run on it."""
    module = ParsedModule("toy", "toy.py", case.before)
    node = next(n for n in ast.parse(case.before).body if isinstance(n, ast.ClassDef))
    rule = RULES[case.rule]
    method, facts = _facts(rule, module, node.name, case.facts)
    rewrite = apply_rules(module, [rule()], facts, subject=node.name, within=[method])
    original = rewrite.original(method)
    assert case.before.count(original) == 1
    return case.before.replace(original, rewrite.text(method))


def _facts(
    rule: type[Rule[Any]], module: ParsedModule, name: str, given: Any
) -> tuple[cst.FunctionDef, Any]:
    if rule in pipeline.RULES:
        source = analyse_pipeline(module, name, ["transformer"])
        facts = PipelineFacts(source.cfg_style, {}, {})
        if given is not None:
            facts = facts_from_json({"transformers": {}, **given})
        return source.call, PipelineContext(source, facts)
    if rule in transformer.RULES:
        whole = {"cfg_style": "none", "cfg_axes": {}, "transformers": {"it": given}}
        forward = Forward(module, name, facts_from_json(whole).transformers["it"])
        return forward.method, forward
    sums = tuple((given or {}).get("token_sums", ()))
    scales = bool((given or {}).get("scales"))
    selects = bool((given or {}).get("selects"))
    pads = bool((given or {}).get("pads"))
    processor = Processor(module, name, sums, scales, selects, pads)
    return processor.method, processor
