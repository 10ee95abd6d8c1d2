"""A run over several ports: what to write, what the lock says, what has drifted."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porter.errors import InternalError, PorterError, Refusal
from porter.lock import LOCK_NAME, Lock, read_lock, stale_reason
from porter.names import output_path, wrapper_name
from porter.port import (
    Port,
    contradiction,
    lock_entry,
    make_port,
    port_again,
    render_ports,
    upstream_symbols,
)
from porter.report import state
from porter.source import sha256
from porter.workers import TIMEOUT, in_processes, port_all
from porter.write import check_not_edited, write_all


@dataclass(frozen=True)
class Plan:
    """What a run would write.

    Attributes:
        ports: the ports that were asked for, by name.
        failed: names that could not be ported, with the reason.
        outputs: text of each file that these ports have a part in, by path.
        lock: the lock afterwards.
        known: sha256 of what porter wrote last, by path.
    """

    ports: Mapping[str, Port]
    failed: Mapping[str, PorterError]
    outputs: Mapping[str, str]
    lock: Lock
    known: Mapping[str, str]

    def write(self, folder: Path) -> list[str]:
        """Writes the files and the lock; the paths that changed.

        A file of a port that is refused now goes, unless someone edited it.

        Raises:
            DriftError: a file was edited by hand; nothing is written.
        """
        check_not_edited(folder, self.outputs, self.known)
        changed = write_all(folder, {**self.outputs, LOCK_NAME: self.lock.text()})
        for path in sorted(self.known.keys() - self.lock.known_outputs().keys()):
            file = folder / path
            if file.is_file() and sha256(file.read_text("utf-8")) == self.known[path]:
                file.unlink()
                changed.append(path)
        return changed

    def would_change(self, folder: Path) -> list[str]:
        """The paths that `write` would change."""
        texts = {**self.outputs, LOCK_NAME: self.lock.text()}
        return [
            path
            for path, text in sorted(texts.items())
            if not (folder / path).is_file()
            or (folder / path).read_text(encoding="utf-8") != text
        ]

    @property
    def exit_code(self) -> int:
        """0 when all were ported, 1 when some were refused, 2 after a fault of porter."""
        faults = any(isinstance(e, InternalError) for e in self.failed.values())
        return 2 if faults else int(bool(self.failed))


def plan(
    names: Sequence[str],
    folder: Path,
    *,
    override: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Ports pipelines together with the ports in the lock that share files with them.

    Args:
        names: classes, in any order: the result does not depend on it.
        folder: the output folder.
        override: a file with a subclass of the one generated class.
        progress: called with a line about what is being done.

    Raises:
        PorterError: a class cannot be ported, or the lock is no lock.
    """
    ports: dict[str, Port] = {}
    for name in sorted(set(names)):
        progress(f"porting {name}")
        port = make_port(name)
        render_ports([port])
        ports[port.name] = port
    return _plan(ports, {}, folder, override)


def plan_all(
    names: Sequence[str],
    folder: Path,
    *,
    progress: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Like `plan`, with several processes; a class that cannot be ported stops no other.

    What is refused is kept in the lock with its reason, a fault of porter's own is not.

    Args:
        names: classes, in any order.
        folder: the output folder.
        progress: called with a line about each result.

    Raises:
        PorterError: the lock is no lock.
    """
    wanted = sorted(set(names))
    ports: dict[str, Port] = {}
    failed: dict[str, PorterError] = {}
    for number, outcome in enumerate(port_all(wanted), 1):
        if isinstance(outcome.result, PorterError):
            failed[outcome.name] = outcome.result
        else:
            ports[outcome.result.name] = outcome.result
        progress(
            f"[{number}/{len(wanted)}] {outcome.name}:"
            f" {state(outcome.result)} in {outcome.seconds:.1f} s"
        )
    return _plan(ports, _take_clashes(ports, failed), folder, None)


def _take_clashes(
    ports: dict[str, Port], failed: Mapping[str, PorterError]
) -> dict[str, PorterError]:
    """Takes out the ports that cannot stand in one folder with an earlier one."""
    refused = dict(failed)
    modules: dict[str, str] = {}
    for name, port in sorted(ports.items()):
        own = {output_path(u.kind, u.upstream.module): u.upstream for u in port.classes}
        clash = [
            p for p, u in own.items() if modules.get(p, u.module.name) != u.module.name
        ]
        if clash:
            refused[name] = Refusal(
                f"{modules[clash[0]]} and {own[clash[0]].module.name} both make {clash[0]}",
                expected="file names that differ",
                todo="port one of them into another folder with --output",
            )
            del ports[name]
        elif refusal := contradiction(
            port, [o for n, o in sorted(ports.items()) if n < name]
        ):
            refused[name] = refusal
            del ports[name]
        else:
            modules.update({path: u.module.name for path, u in own.items()})
    return refused


def _plan(
    ports: dict[str, Port],
    failed: Mapping[str, PorterError],
    folder: Path,
    override: Path | None,
) -> Plan:
    lock = read_lock(folder)
    known = lock.known_outputs()
    for name, error in sorted(failed.items()):
        if isinstance(error, InternalError):
            if name in _sharing(lock, ports):
                # The others' file is written without it, so it is gone.
                lock = lock.without_port(name)
        else:
            lock = lock.without_port(name).with_refusal(name, str(error))
    for name, entry in _sharing(lock, ports).items():
        # One file cannot come from two versions of the library.
        if stale_reason(entry):
            ports[name] = make_port(name)
    together = {
        **{n: port_again(n, entry) for n, entry in _sharing(lock, ports).items()},
        **ports,
    }
    touched = {path for port in ports.values() for path in port.paths()}
    outputs = {
        path: text
        for path, text in render_ports(together.values()).items()
        if path in touched
    }
    for name, port in sorted(together.items()):
        if name in ports:
            entry = lock_entry(port, outputs)
            file = override or _kept_override(lock, name, folder)
            if file is not None:
                outputs.update(_add_override(entry, port, file))
        else:
            old = lock.ports[name]
            shared = {p: sha256(t) for p, t in outputs.items() if p in old["outputs"]}
            entry = {**old, "outputs": {**old["outputs"], **shared}}
        lock = lock.with_port(name, entry)
    return Plan(ports, failed, outputs, lock, known)


def drift(folder: Path) -> dict[str, list[str]]:
    """What no longer fits, by port: upstream symbols, outputs, files edited by hand."""
    lock = read_lock(folder)
    found: dict[str, list[str]] = {name: [] for name in sorted(lock.ports)}
    ports: dict[str, Port] = {}
    for outcome in in_processes(
        functools.partial(_again, lock.ports), list(found), timeout=TIMEOUT
    ):
        name, entry = outcome.name, lock.ports[outcome.name]
        if reason := stale_reason(entry):
            found[name].append(reason)
        if isinstance(outcome.result, PorterError):
            found[name].append(f"no longer ports: {outcome.result}")
            continue
        ports[name], symbols = outcome.result
        found[name] += _changed_symbols(entry["upstream"], symbols)
    outputs = render_ports(ports.values())
    for name, entry in sorted(lock.ports.items()):
        for path, sha in sorted(entry["outputs"].items()):
            if name in ports and path in outputs and sha256(outputs[path]) != sha:
                found[name].append(f"{path} would be written differently")
            file = folder / path
            if file.is_file() and sha256(file.read_text(encoding="utf-8")) != sha:
                found[name].append(f"{path} was edited by hand or is of another run")
    return found


def _again(
    entries: Mapping[str, Mapping[str, Any]], name: str
) -> tuple[Port, dict[str, str]]:
    """A port of the lock from the installed source, and the symbols that it uses."""
    port = port_again(name, entries[name])
    return port, upstream_symbols(port)


def _changed_symbols(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    return [
        f"{symbol} {'changed' if symbol in old and symbol in new else 'came or went'}"
        for symbol in sorted({*old, *new})
        if old.get(symbol) != new.get(symbol)
    ]


def _sharing(lock: Lock, ports: Mapping[str, Port]) -> dict[str, Mapping[str, Any]]:
    """Entries of the lock that share a file with `ports`."""
    paths = {path for port in ports.values() for path in port.paths()}
    return {
        name: entry
        for name, entry in sorted(lock.ports.items())
        if name not in ports and paths & set(entry["outputs"])
    }


def _kept_override(lock: Lock, name: str, folder: Path) -> Path | None:
    """The subclass that an earlier run recorded; deleting its file drops it."""
    recorded = lock.ports.get(name, {}).get("override")
    if not recorded or not (folder / recorded["file"]).is_file():
        return None
    return folder / str(recorded["file"])


def _add_override(entry: dict[str, Any], port: Port, file: Path) -> dict[str, str]:
    """Records a subclass in the entry; its file becomes one of the outputs.

    Raises:
        PorterError: there is no such file, or it has not exactly one subclass of the port.
    """
    if not file.is_file():
        raise PorterError(f"no file {file.as_posix()}", expected="--with overrides.py")
    text = file.read_text(encoding="utf-8")
    base = wrapper_name("pipeline", port.upstream.class_name)
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise PorterError(
            f"a syntax error ({error.msg})", where=f"{file.name}:{error.lineno}"
        ) from error
    classes = [
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(b).rpartition(".")[2] == base for b in node.bases)
    ]
    if len(classes) != 1:
        raise Refusal(
            f"{file.name} has {len(classes)} subclasses of {base}", expected="one"
        )
    path = f"overrides/{base}.py"
    entry["override"] = {"file": path, "class": classes[0]}
    entry["outputs"] = {**entry["outputs"], path: sha256(text)}
    return {path: text}
