"""From a class name to its upstream source; the only file that knows where diffusers is.

Nothing upstream is imported: files are found through the import system's path and read.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from porter.errors import PorterError
from porter.parsed import ParsedModule, syntax_tree

LIBRARY = "diffusers"
_CLASS = re.compile(rb"^class (\w+)", re.MULTILINE)


@dataclass(frozen=True)
class Upstream:
    """One upstream class and the file that defines it.

    Attributes:
        class_name: the class.
        module: its file, parsed.
        version: version of the installed diffusers.
        sha256: of the class's source text.
    """

    class_name: str
    module: ParsedModule
    version: str
    sha256: str

    @property
    def reference(self) -> str:
        """`package.module:Class`, which `load` takes back."""
        return f"{self.module.name}:{self.class_name}"


def sha256(text: str) -> str:
    """Hexadecimal SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def package_root(package: str) -> Path:
    """Folder of an installed top-level package, found without importing it.

    Raises:
        PorterError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise PorterError(
            f"no package {package}",
            expected=f"{package} in this Python environment",
            todo=f"install it: pip install {package}",
        )
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def library_version() -> str:
    """`__version__` of the installed diffusers."""
    text = (package_root(LIBRARY) / "__init__.py").read_text(encoding="utf-8")
    for statement in ast.parse(text).body:
        if (
            isinstance(statement, ast.Assign)
            and isinstance(statement.targets[0], ast.Name)
            and statement.targets[0].id == "__version__"
        ):
            return str(ast.literal_eval(statement.value))
    raise PorterError(f"{LIBRARY}/__init__.py without __version__")


def load(name: str) -> Upstream:
    """The source of a class.

    Args:
        name: a class of diffusers, or `package.module:ClassName`.

    Raises:
        PorterError: no such class; near names are given.
    """
    if ":" in name:
        module_name, class_name = name.split(":", 1)
        path = _module_path(module_name)
    else:
        class_name = name
        path = _find_class(name)
        module_name = _module_name(path)
    if class_name not in _classes(path):
        raise PorterError(
            f"no class {class_name} in {module_name}",
            expected=f"one of {', '.join(sorted(_classes(path))) or 'its classes'}",
        )
    module = _parsed(path, module_name, class_name)
    text = module.source(module.class_def(class_name))
    return Upstream(class_name, module, library_version(), sha256(text))


def pipeline_classes() -> list[str]:
    """Every class of `pipeline_nodes`, in alphabetical order."""
    return sorted(pipeline_nodes())


@cache
def pipeline_nodes() -> Mapping[str, tuple[str, ast.ClassDef]]:
    """The library's pipelines with a denoising transformer: name to module and class.

    Such a class owns `__call__` and takes a transformer. One that decodes with a
    `VQModel` predicts codes of a vocabulary: it denoises nothing, and is left out.
    """
    found: dict[str, tuple[str, ast.ClassDef]] = {}
    for path in sorted((package_root(LIBRARY) / "pipelines").rglob("pipeline_*.py")):
        if b"transformer" not in path.read_bytes():
            continue
        for node in _top_level(path):
            if not isinstance(node, ast.ClassDef) or not denoiser_parameters(node):
                continue
            methods = methods_of(node)
            if "__call__" in methods and "VQModel" not in _annotations(
                methods["__init__"]
            ):
                found[node.name] = (_module_name(path), node)
    return found


def methods_of(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    """The methods that a class itself defines, by name."""
    return {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}


def _annotations(function: ast.FunctionDef) -> set[str]:
    arguments = (*function.args.args, *function.args.kwonlyargs)
    return {ast.unparse(a.annotation) for a in arguments if a.annotation is not None}


def _public_pipelines() -> list[str]:
    """Names of pipeline classes that the library exports, read from one file."""
    names = (
        node.value
        for statement in _top_level(package_root(LIBRARY) / "__init__.py")
        for node in ast.walk(statement)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    return sorted({n for n in names if n.endswith("Pipeline") and n.isidentifier()})


def is_transformer(name: str) -> bool:
    """Whether a component of this name is a denoising transformer."""
    return "transformer" in name


def denoiser_parameters(node: ast.ClassDef) -> dict[str, str]:
    """Parameters of `__init__` that hold a transformer, with their annotations."""
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            return {
                arg.arg: ast.unparse(arg.annotation) if arg.annotation else ""
                for arg in (*part.args.args, *part.args.kwonlyargs)
                if is_transformer(arg.arg)
            }
    return {}


def class_node(upstream: Upstream) -> ast.ClassDef:
    """The class as an `ast` node."""
    for node in syntax_tree(upstream.module.text).body:
        if isinstance(node, ast.ClassDef) and node.name == upstream.class_name:
            return node
    raise PorterError(f"no class {upstream.class_name}", where=upstream.module.file)


@cache
def symbol(module_name: str, name: str) -> tuple[str, str] | None:
    """Where a module-level name is really defined, and the text that defines it.

    Follows imports inside the same top-level package.

    Returns:
        ("module.name", source text), or None when another package defines the name.
    """
    for _ in range(8):
        path = _module_path(module_name)
        origin = None
        for node in _bound_in(_top_level(path)):
            if _defines(node, name):
                return f"{module_name}.{name}", _segment(_lines(path), node)
            if isinstance(node, ast.ImportFrom):
                origin = _origin(node, module_name, path, name) or origin
        if origin is None:
            return None
        module_name, name = origin
    return None


def _bound_in(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run at module level, those in branches included."""
    for statement in body:
        yield statement
        for field in ("body", "orelse", "handlers", "finalbody"):
            if not isinstance(statement, ast.FunctionDef | ast.ClassDef):
                yield from _bound_in(getattr(statement, field, []))


def _defines(node: ast.AST, name: str) -> bool:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name == name
    if isinstance(node, ast.Assign):
        return any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
    return False


def _origin(
    node: ast.ImportFrom, module_name: str, path: Path, name: str
) -> tuple[str, str] | None:
    for alias in node.names:
        if (alias.asname or alias.name) != name:
            continue
        base = module_name.split(".")
        if node.level:
            is_package = path.name == "__init__.py"
            base = base[: len(base) - node.level + (1 if is_package else 0)]
            target = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
        else:
            target = node.module or ""
        if target.split(".")[0] != module_name.split(".")[0]:
            return None
        # A constant is no class, and the file of the package itself says where it is.
        is_class = alias.name[:1].isupper() and not alias.name.isupper()
        if is_class and _is_lazy_package(target):
            return _module_name(_find_class(alias.name)), alias.name
        return target, alias.name
    return None


def _is_lazy_package(module_name: str) -> bool:
    return _module_path(module_name).name == "__init__.py"


@cache
def _parsed(path: Path, module_name: str, class_name: str) -> ParsedModule:
    text = path.read_text(encoding="utf-8")
    return ParsedModule(module_name, _display(path, module_name), text, only=class_name)


def _display(path: Path, module_name: str) -> str:
    parts = module_name.split(".")
    if path.name == "__init__.py":
        parts.append("__init__")
    return "/".join(parts) + ".py"


def _module_path(module_name: str) -> Path:
    """File of a module, found without importing anything."""
    top, *rest = module_name.split(".")
    candidates: list[Path] = []
    if rest:
        path = package_root(top).joinpath(*rest)
        candidates = [path.with_suffix(".py"), path / "__init__.py"]
    elif (spec := importlib.util.find_spec(top)) is not None and spec.origin:
        candidates = [Path(spec.origin)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise PorterError(
        f"no module {module_name}",
        expected="package.module:ClassName with a module that Python finds",
    )


def _module_name(path: Path) -> str:
    relative = path.relative_to(package_root(LIBRARY)).with_suffix("")
    return ".".join([LIBRARY, *relative.parts])


@cache
def _lines(path: Path) -> list[bytes]:
    # Columns of the syntax tree count bytes.
    return path.read_text(encoding="utf-8").encode().split(b"\n")


def _segment(lines: list[bytes], node: ast.stmt) -> str:
    """The text of a statement; `ast.get_source_segment` splits the file at each call."""
    last = node.end_lineno or node.lineno
    found = lines[node.lineno - 1 : last]
    found[-1] = found[-1][: node.end_col_offset]
    found[0] = found[0][node.col_offset :]
    return b"\n".join(found).decode()


@cache
def _top_level(path: Path) -> tuple[ast.stmt, ...]:
    return tuple(syntax_tree(path.read_text(encoding="utf-8")).body)


def _classes(path: Path) -> set[str]:
    return {node.name for node in _top_level(path) if isinstance(node, ast.ClassDef)}


def _library_files() -> Iterator[Path]:
    for path in sorted(package_root(LIBRARY).rglob("*.py")):
        # Stand-ins that raise when a dependency is missing carry the real names.
        if not path.name.startswith("dummy_"):
            yield path


@cache
def _files_by_class() -> Mapping[str, list[Path]]:
    """The files that define a class of each name at module level."""
    found: dict[str, list[Path]] = {}
    for path in _library_files():
        for name in dict.fromkeys(_CLASS.findall(path.read_bytes())):
            found.setdefault(name.decode(), []).append(path)
    return found


def _find_class(name: str) -> Path:
    # A line of a long string may look like a class.
    found = [p for p in _files_by_class().get(name, []) if name in _classes(p)]
    if len(found) == 1:
        return found[0]
    if found:
        places = ", ".join(_module_name(path) for path in found)
        raise PorterError(
            f"{len(found)} classes {name}",
            expected="one",
            todo=f"write module:{name} with one of {places}",
        )
    near = difflib.get_close_matches(name, _public_pipelines(), n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else "check the spelling"
    raise PorterError(
        f"unknown class {name}",
        expected=f"a pipeline class of {LIBRARY} {library_version()}"
        " or package.module:ClassName",
        todo=hint,
    )
