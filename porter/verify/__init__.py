"""Proof of a port: every parallel mode compared with stock diffusers on tiny models."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from porter.errors import PorterError
from porter.lock import LOCK_NAME, proof_key, read_lock
from porter.report import Report
from porter.verify.modes import Mode, all_modes, parse_modes
from porter.verify.proofs import with_verification
from porter.verify.selection import Selection, Tier
from porter.verify.verdict import Verification
from porter.verify.verification import verify_pipeline
from porter.workers import Outcome, in_processes
from porter.write import write_all

__all__ = [
    "Mode",
    "Selection",
    "Tier",
    "Verification",
    "all_modes",
    "parse_modes",
    "run",
    "verify_pipeline",
]
#: Seconds for one port where several are verified at a time.
TIMEOUT = 1800.0


@dataclass(frozen=True)
class _Finding:
    """What was verified of one port, and the key of what it was verified on."""

    verification: Verification
    key: dict[str, str]


def run(
    names: Sequence[str],
    selection: Selection,
    *,
    generated: Path,
    processes: int = 1,
    as_json: bool = False,
) -> int:
    """Verify ports of a lock, print a table of each and keep the proofs in the lock.

    What stops one port is reported and does not stop the others.

    Args:
        names: ports; none means every port of the lock.
        selection: the modes of each.
        generated: folder of the ports and of the lock.
        processes: how many ports are verified at a time.
        as_json: print JSON in place of the tables.

    Returns:
        0 when every mode of every port is proven, else 1.

    Raises:
        PorterError: a mode is unknown, or the only port cannot be verified.
    """
    report = Report(as_json=as_json)
    ports = list(names or sorted(read_lock(generated).ports))
    several = processes > 1 and len(ports) > 1
    say = (lambda _: None) if several else report.message
    task = functools.partial(_verify, selection, generated, say)
    code, found = 0, []
    outcomes = (
        in_processes(task, ports, processes=processes, timeout=TIMEOUT)
        if several
        else _in_turn(task, ports)
    )
    for number, outcome in enumerate(outcomes, 1):
        result = outcome.result
        if several:
            seconds = f"{outcome.seconds:.0f} s"
            report.message(f"[{number}/{len(ports)}] {outcome.name}: {seconds}")
        if isinstance(result, PorterError):
            if len(ports) == 1:
                raise result
            report.message(f"error: {outcome.name}: {result}")
            code = 1
        elif result is not None:
            if selection.is_proof:
                _keep_proofs(outcome.name, generated, result)
            found.append(result.verification)
            code = max(code, result.verification.exit_code)
            if not as_json:
                report.line(result.verification.table())
    if as_json:
        report.json([verification.to_json() for verification in found])
    return code


def _in_turn(
    task: Callable[[str], _Finding | None], names: Sequence[str]
) -> Iterator[Outcome[_Finding | None]]:
    """The outcomes of a task for each name, in this process."""
    for name in names:
        started = time.monotonic()
        result: _Finding | None | PorterError
        try:
            result = task(name)
        except PorterError as error:
            result = error
        yield Outcome(name, result, time.monotonic() - started)


def _verify(
    selection: Selection, generated: Path, say: Callable[[str], None], name: str
) -> _Finding | None:
    """One port; None where nothing is left to verify.

    Raises:
        PorterError: the port or a mode is unknown, or nothing can be run.
    """
    ports = read_lock(generated).ports
    if name not in ports:
        raise PorterError(
            f"no port {name} in {(generated / LOCK_NAME).as_posix()}",
            expected=", ".join(sorted(ports)) or "a port",
            todo=f"run porter add-model {name}",
        )
    entry = ports[name]
    modes = selection.of_port(name, entry)
    for kind, reason in sorted(entry.get("refused_modes", {}).items()):
        say(f"{name} is ported without {kind}: {reason}")
    if selection.missing and not modes:
        say(f"{name}: nothing is missing")
        return None
    key = proof_key(entry)
    verification = verify_pipeline(
        name,
        generated=generated,
        modes=modes,
        cases=selection.cases,
        say=say,
    )
    return _Finding(verification, key)


def _keep_proofs(name: str, generated: Path, finding: _Finding) -> None:
    """Write the proofs into the lock.

    Raises:
        PorterError: what was verified is not what is there now.
    """
    # Read again: another command may have written since.
    lock = read_lock(generated)
    if name not in lock.ports or proof_key(lock.ports[name]) != finding.key:
        raise PorterError(
            f"{name} or the runtime changed while it was verified",
            expected="one version of both",
            todo="run porter verify again",
        )
    lock = with_verification(lock, name, finding.verification)
    write_all(generated, {LOCK_NAME: lock.text()})
