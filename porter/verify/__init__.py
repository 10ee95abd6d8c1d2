"""Proof of a port: every parallel mode compared with stock diffusers on tiny models."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from pathlib import Path

from porter.errors import PorterError
from porter.lock import LOCK_NAME, proof_key, read_lock
from porter.report import Report
from porter.verify.modes import CORE, Mode, all_modes, parse_modes
from porter.verify.proofs import with_verification
from porter.verify.verdict import Verification
from porter.verify.verification import SABOTAGED, verify_pipeline
from porter.write import write_all

__all__ = [
    "Mode",
    "Tier",
    "Verification",
    "all_modes",
    "parse_modes",
    "run",
    "verify_pipeline",
]


class Tier(enum.StrEnum):
    """How much is run where no modes are named.

    `full` takes every mode; `core` one mode for each way of splitting; `fast` one mode
    with one call and its sabotage, which is a check and no proof.
    """

    full = "full"
    core = "core"
    fast = "fast"


def run(
    names: Sequence[str],
    modes: Sequence[str] | None,
    *,
    generated: Path,
    tier: Tier = Tier.full,
    as_json: bool = False,
) -> int:
    """Verify ports of a lock, print a table of each and keep the proofs in the lock.

    What stops one port is reported and does not stop the others.

    Args:
        names: ports; none means every port of the lock.
        modes: names of modes, or None for those of the tier that the ports have.
        generated: folder of the ports and of the lock.
        tier: how much to run where `modes` is None.
        as_json: print JSON in place of the tables.

    Returns:
        0 when every mode of every port is proven, else 1.

    Raises:
        PorterError: a mode is unknown, or the only port cannot be verified.
    """
    report = Report(as_json=as_json)
    wanted = None if modes is None else parse_modes(modes)
    code, found = 0, []
    ports = names or sorted(read_lock(generated).ports)
    for name in ports:
        try:
            verification = _verify(name, wanted, tier, generated, report)
        except PorterError as error:
            if len(ports) == 1:
                raise
            report.message(f"error: {name}: {error}")
            code = 1
            continue
        found.append(verification)
        code = max(code, verification.exit_code)
        if not as_json:
            report.line(verification.table())
    if as_json:
        report.json([verification.to_json() for verification in found])
    return code


def _verify(
    name: str,
    wanted: Sequence[Mode] | None,
    tier: Tier,
    generated: Path,
    report: Report,
) -> Verification:
    """One port; its proofs are kept unless the tier is no proof.

    Raises:
        PorterError: the port or a mode is unknown, or nothing can be run.
    """
    chosen = _modes_of(name, generated, wanted, tier, report)
    key = proof_key(read_lock(generated).ports[name])
    is_fast = wanted is None and tier is Tier.fast
    verification = verify_pipeline(
        name,
        generated=generated,
        modes=chosen,
        cases=(SABOTAGED,) if is_fast else None,
        say=report.message,
    )
    if not is_fast:
        _keep_proofs(name, generated, key, verification)
    return verification


def _modes_of(
    name: str,
    generated: Path,
    wanted: Sequence[Mode] | None,
    tier: Tier,
    report: Report,
) -> tuple[Mode, ...]:
    """The modes to verify: those of the tier that the port has, or those asked for.

    Raises:
        PorterError: the lock has no such port, or the port lacks a mode that was asked for.
    """
    ports = read_lock(generated).ports
    if name not in ports:
        raise PorterError(
            f"no port {name} in {(generated / LOCK_NAME).as_posix()}",
            expected=", ".join(sorted(ports)) or "a port",
            todo=f"run porter add-model {name}",
        )
    refused = ports[name].get("refused_modes", {})
    chosen = []
    for mode in (
        (all_modes() if tier is Tier.full else CORE) if wanted is None else wanted
    ):
        missing = [kind for kind in mode.kinds if kind in refused]
        if not missing:
            chosen.append(mode)
        elif wanted is not None:
            raise PorterError(
                f"mode {mode.name}: {name} is ported without {missing[0]}"
                f" ({refused[missing[0]]})",
                expected="modes that the port has",
            )
    for kind, reason in sorted(refused.items()):
        report.message(f"{name} is ported without {kind}: {reason}")
    if wanted is None and tier is Tier.fast:
        # Guidance moves least of the model: another way of splitting shows more.
        chosen = sorted(chosen, key=lambda mode: mode.cfg)[:1]
    return tuple(chosen)


def _keep_proofs(
    name: str, generated: Path, key: Mapping[str, str], verification: Verification
) -> None:
    """Write the proofs into the lock.

    Raises:
        PorterError: what was verified is not what is there now.
    """
    # Read again: another command may have written since.
    lock = read_lock(generated)
    if name not in lock.ports or proof_key(lock.ports[name]) != key:
        raise PorterError(
            f"{name} or the runtime changed while it was verified",
            expected="one version of both",
            todo="run porter verify again",
        )
    lock = with_verification(lock, name, verification)
    write_all(generated, {LOCK_NAME: lock.text()})
