"""From a pipeline's name to the generated class: checks the lock, then imports the port.

What is imported is what was hashed: a file that was edited, or made from another diffusers
than the installed one, is refused.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xfuser_runtime.errors import InputError, NotSupportedError
from xfuser_runtime.proofs import Proofs, runtime_sha256

#: Ports are imported under this name, by their path in the folder; a subclass passed to
#: `porter add-model --with` imports its base from there.
PACKAGE = "xfuser_generated"
#: Name and format of the file that porter writes beside the ports.
_LOCK = "porter.lock"
_LOCK_VERSION = 1

Entry = Mapping[str, Any]


def load_pipeline_class(name: str, generated: str | Path = "generated") -> Any:
    """The generated wrapper class of a pipeline.

    Args:
        name: as given to `porter add-model`: a class of diffusers, or
            `package.module:ClassName`.
        generated: the folder that porter wrote, with `porter.lock` in it.

    Returns:
        `xFuser<Pipeline>`; wrapping a pipeline with it refuses unproven modes.

    Raises:
        InputError: there is no port of that name.
        NotSupportedError: a file of the port is missing, edited, or made from another
            diffusers than the installed one.
    """
    folder = Path(generated)
    name, entry = _find_port(folder, name)
    installed = importlib.metadata.version("diffusers")
    if entry["diffusers"] != installed:
        raise NotSupportedError(
            f"{folder / _LOCK}: {name} was made from diffusers {entry['diffusers']}, "
            f"expected the installed {installed}; {_port_it(name)}"
        )
    # A subclass passed with --with imports the port, so it comes last.
    chosen = entry["override"] or entry["generated"]
    paths = sorted(entry["outputs"], key=lambda path: (path == chosen["file"], path))
    for path in paths:
        module = _import_output(folder, name, path, entry["outputs"][path])
    cls = getattr(module, chosen["class"])
    cls.check_proven = _proofs(name, entry).check_proven
    return cls


def _find_port(folder: Path, name: str) -> tuple[str, Entry]:
    """The name and entry of a port, looked up by its name or its upstream class."""
    path = folder / _LOCK
    if not path.is_file():
        raise InputError(
            f"{path}: no such file, expected the lock of the ports; {_port_it(name)}"
        )
    try:
        lock = json.loads(path.read_text(encoding="utf-8"))
        version, ports = lock["version"], dict(lock["ports"])
    except (ValueError, KeyError, TypeError):
        version, ports = None, {}
    if version != _LOCK_VERSION:
        raise InputError(
            f"{path}: no lock of version {_LOCK_VERSION}, expected a file that this porter "
            f"wrote; delete it and {_port_it(name)}"
        )
    if name in ports:
        return name, ports[name]
    for port, entry in ports.items():
        if name in (entry["class"], entry["class"].rpartition(":")[2]):
            return port, entry
    raise InputError(
        f"{path}: no port of {name}, expected one of: {', '.join(sorted(ports)) or 'none'}; "
        f"run `porter add-model {name}`"
    )


def _proofs(name: str, entry: Entry) -> Proofs:
    """The proofs in a port's entry, with the reason where they do not hold here."""
    recorded = entry.get("proofs") or {"key": {}, "modes": {}}
    outputs = "\n".join(
        f"{path} {sha}" for path, sha in sorted(entry["outputs"].items())
    )
    torch = importlib.metadata.version("torch").split("+")[0]
    key = {
        "outputs": hashlib.sha256(outputs.encode()).hexdigest(),
        "diffusers": entry["diffusers"],
        "runtime": runtime_sha256(),
        "torch": ".".join(torch.split(".")[:2]),
    }
    changed = [part for part in key if recorded["key"].get(part) != key[part]]
    return Proofs(
        port=name,
        modes=frozenset(recorded["modes"]),
        stale=(
            f"{' and '.join(changed)} changed since"
            if changed and recorded["modes"]
            else ""
        ),
        refused=entry["refused_modes"],
    )


def load_upstream_class(name: str) -> Any:
    """The class that a port is made from.

    Args:
        name: a class of diffusers, or `package.module:ClassName`.

    Raises:
        InputError: there is no such class; near names are given.
    """
    module_name, _, class_name = name.rpartition(":")
    try:
        module = importlib.import_module(module_name or "diffusers")
    except ImportError as error:
        raise InputError(f"{error}, expected a module; check the name {name}") from None
    if not hasattr(module, class_name):
        near = difflib.get_close_matches(class_name, dir(module))
        raise InputError(
            f"no class {class_name} in {module.__name__}, expected "
            f"{' or '.join(near) or 'a pipeline'}; check the name"
        )
    return getattr(module, class_name)


def _import_output(folder: Path, name: str, path: str, sha256: str) -> types.ModuleType:
    """Import one generated file, once for each content."""
    file = folder / path
    if not file.is_file():
        raise NotSupportedError(
            f"{file}: no such file, expected it by the lock; {_port_it(name)}"
        )
    text = file.read_bytes()
    if hashlib.sha256(text).hexdigest() != sha256:
        raise NotSupportedError(
            f"{file}: edited since porter wrote it, expected what the lock records; "
            f"delete it and {_port_it(name)}, with changes in a subclass (--with)"
        )
    module_name = f"{PACKAGE}.{path.removesuffix('.py').replace('/', '.')}"
    module = sys.modules.get(module_name)
    if module is None or module.__dict__.get("__sha256__") != sha256:
        module = types.ModuleType(module_name)
        module.__dict__.update(__file__=str(file), __sha256__=sha256)
        # In place first: torch.compile and dataclasses look modules up by name.
        sys.modules[module_name] = module
        try:
            exec(compile(text, str(file), "exec"), vars(module))
        except BaseException:
            del sys.modules[module_name]
            raise
    return module


def _port_it(name: str) -> str:
    return f"run `porter add-model {name}`"
