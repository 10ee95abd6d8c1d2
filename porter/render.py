"""Puts rewritten methods into the frames of `templates/` and adds the imports, once."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2

from porter import __version__
from porter.analysis.facts import TransformerFacts
from porter.errors import PorterError, Refusal
from porter.names import Binding, bindings, free_names, local_names, wrapper_name
from porter.parsed import syntax_tree
from porter.rules.engine import Rewrite
from porter.rules.format import format_statements
from porter.source import LIBRARY, Upstream

_FRAME_IMPORTS = {
    "pipeline": (
        ("xfuser_runtime.config", "EngineConfig"),
        ("xfuser_runtime.pipelines", "xFuserPipelineBaseWrapper"),
        ("xfuser_runtime.pipelines", "xFuserPipelineWrapperRegister"),
    ),
    "transformer": (
        ("xfuser_runtime.transformers", "xFuserTransformerBaseWrapper"),
        ("xfuser_runtime.transformers", "xFuserTransformerWrappersRegister"),
    ),
    "attention": (("xfuser_runtime.layers", "xFuserAttentionProcessorRegister"),),
}


@dataclass(frozen=True)
class Rewritten:
    """One rewritten class.

    Attributes:
        kind: "pipeline", "transformer" or "attention"; the template's name.
        upstream: the class.
        rewrite: its edits.
        original: upstream's text of the rewritten method.
        text: the method after the edits.
        method_start: the method's first line in upstream's file.
        refused_modes: mode to reason, for a pipeline.
        facts: what was measured of a transformer, None for other kinds.
    """

    kind: str
    upstream: Upstream
    rewrite: Rewrite
    original: str
    text: str
    method_start: int
    refused_modes: Mapping[str, str]
    facts: TransformerFacts | None = None

    @property
    def name(self) -> str:
        """Name of the generated class."""
        return wrapper_name(self.kind, self.upstream.class_name)

    def upstream_names(self) -> set[str]:
        """Globals of the upstream module that the generated code uses."""
        given = {name for _, name in self.imports()}
        return (free_names(self.text, self.upstream.class_name) - given) | {
            self.upstream.class_name
        }

    def imports(self) -> set[tuple[str, str]]:
        """(module, name) pairs that rules and frame ask for."""
        return {*self.rewrite.imports, *_FRAME_IMPORTS[self.kind]}


def render(units: Sequence[Rewritten]) -> str:
    """The text of one generated file.

    Args:
        units: the classes of the file, all from one upstream module.

    Raises:
        Refusal: classes of two modules meet in one file, or a name cannot be resolved.
        PorterError: the result is not valid Python, a slip of ours.
    """
    units = sorted(units, key=lambda unit: unit.upstream.class_name)
    first = units[0]
    module = first.upstream.module
    if clash := [u for u in units if u.upstream.module.name != module.name]:
        raise Refusal(
            f"{module.name} and {clash[0].upstream.module.name} in one generated file",
            expected="file names that differ",
            todo="port one of them into another folder with --output",
        )
    header = _template("header").render(
        licence=_licence(module.text),
        porter_version=__version__,
        library=LIBRARY,
        library_version=first.upstream.version,
        source=module.file,
        units=[
            {
                "original": unit.upstream.class_name,
                "sha256": unit.upstream.sha256,
                "rules": ", ".join(
                    f"{rule} ({count})" for rule, count in unit.rewrite.counts.items()
                ),
            }
            for unit in units
        ],
        imports=_imports(units),
    )
    text = header.lstrip("\n") + "".join(_class(unit) for unit in units)
    _check_compiles(text, module.file)
    return text


def _class(unit: Rewritten) -> str:
    return _template(unit.kind).render(
        original=unit.upstream.class_name,
        name=unit.name,
        body=unit.text.rstrip("\n"),
        refused_modes=[(k, repr(v)) for k, v in sorted(unit.refused_modes.items())],
    )


@cache
def _template(name: str) -> jinja2.Template:
    here = Path(__file__).parent
    # In the wheel the templates stand inside the package, in a checkout beside it.
    folders = [here / "templates", here.parent / "templates"]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return environment.get_template(f"{name}.j2")


def _licence(text: str) -> str:
    """The comment lines on top of a file."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line)
    return "\n".join(lines)


def _imports(units: Sequence[Rewritten]) -> str:
    """The import block: other packages, upstream's module, the runtime."""
    module = units[0].upstream.module
    bound = bindings(module)
    requested = {pair for unit in units for pair in unit.imports()}
    used = {name for unit in units for name in unit.upstream_names()}
    for unit in units:
        _check_free(unit, bound)
    if unknown := used - set(bound):
        raise Refusal(
            f"the name {sorted(unknown)[0]}, which {module.file} does not define",
            expected="names of that module",
            where=module.file,
        )
    external = {bound[n].external for n in used if bound[n].external}
    own = [n for n in used if not bound[n].external and bound[n].always]
    maybe = sorted(n for n in used if not bound[n].external and not bound[n].always)
    runtime: dict[str, list[str]] = defaultdict(list)
    for source, name in requested:
        runtime[source].append(name)
    lines = [
        f"from {source} import {', '.join(sorted(runtime[source]))}"
        for source in runtime
    ]
    standard = sorted(external) + [
        line for line in lines if "xfuser_runtime" not in line
    ]
    blocks = [
        ["from __future__ import annotations"] if _has_future(module.text) else [],
        sorted(set(standard), key=_import_order),
        [f"from {module.name} import {', '.join(sorted(own))}"] if own else [],
        sorted(line for line in lines if "xfuser_runtime" in line),
    ]
    if maybe:
        package, _, leaf = module.name.rpartition(".")
        blocks[2].insert(0, f"from {package} import {leaf} as upstream_module")
        why = "# bound upstream only where an optional package is installed"
        lines = [f'{n} = getattr(upstream_module, "{n}", None)' for n in maybe]
        blocks.append([why, *lines])
    text = "\n\n".join("\n".join(block) for block in blocks if block)
    return format_statements(text, "")


def _import_order(line: str) -> tuple[bool, str]:
    return line.startswith("from"), line


def _check_free(unit: Rewritten, bound: Mapping[str, Binding]) -> None:
    """Refuses a method in which a name that the rules import means something else."""
    local = local_names(unit.text)
    used = free_names(unit.original, unit.upstream.class_name)
    for source, name in sorted(unit.imports()):
        same = name in bound and bound[name].external == f"from {source} import {name}"
        if name in local or (name in used and not same):
            raise Refusal(
                f"{unit.upstream.class_name} has a {name} of its own",
                expected="the name free for what the rules import",
                where=unit.upstream.module.file,
            )


def _has_future(text: str) -> bool:
    return any(
        isinstance(node, ast.ImportFrom)
        and node.module == "__future__"
        and any(alias.name == "annotations" for alias in node.names)
        for node in syntax_tree(text).body
    )


def _check_compiles(text: str, source: str) -> None:
    try:
        compile(text, source, "exec")
    except SyntaxError as error:
        raise PorterError(
            f"generated text that is no Python, line {error.lineno}: {error.msg}",
            where=source,
        ) from error
