"""What is proven of the installed diffusers: every pipeline by every parallel mode.

Rows come from the installed source, their states from the lock of one output folder:
nothing is ported and no model is run.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porter.errors import PorterError
from porter.lock import Lock, proof_key, read_lock, stale_reason
from porter.rules import attention, pipeline, transformer
from porter.source import library_version
from porter.tasks import pipeline_tasks

#: Columns: what each needs to be proven, in the names of proofs.
MODES: Mapping[str, tuple[str, ...]] = {
    "dp": ("dp",),
    "cfg": ("cfg",),
    "ulysses": ("ulysses",),
    "ring": ("ring",),
    "hybrid": ("ulysses", "ring", "ring x ulysses"),
    "stages": ("pp",),
    "PipeFusion": ("pipefusion",),
}
_PACKAGES = {
    "pipeline": [rule() for rule in pipeline.RULES],
    "transformer": [rule() for rule in transformer.RULES],
    "attention": [rule() for rule in attention.RULES],
}
PROVEN, UNVERIFIED, REFUSED = STATES = ("proven", "not verified", "refused")


@dataclass(frozen=True)
class Cell:
    """One mode of one pipeline.

    Attributes:
        state: one of `STATES`.
        reason: why it is not proven: file:line where a construct prevents it, or what its
            verification found wrong.
    """

    state: str
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """One pipeline.

    Attributes:
        name: its class.
        task: for example `text-to-image`.
        is_ported: the lock has a port of it.
        cells: by mode, in the order of `MODES`.
    """

    name: str
    task: str
    is_ported: bool
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class Coverage:
    """A survey.

    Attributes:
        library: version of the installed diffusers.
        task: the task that it is limited to, or "".
        rows: in alphabetical order.
        rules: kind of class to rule id to the classes of these ports that it changes.
        reasons: rule id to the reason that the rule gives for having one user alone.
        changed_lines: kind of class to class to the lines that differ from upstream's.
    """

    library: str
    task: str
    rows: tuple[Row, ...]
    rules: Mapping[str, Mapping[str, tuple[str, ...]]]
    reasons: Mapping[str, str]
    changed_lines: Mapping[str, Mapping[str, int]]

    def counts(self) -> dict[str, dict[str, int]]:
        """Mode to state to number of pipelines."""
        return {
            mode: {s: sum(r.cells[mode].state == s for r in self.rows) for s in STATES}
            for mode in MODES
        }

    def medians(self) -> dict[str, float]:
        """Kind of class to the median of its changed lines; kinds without a class lack."""
        return {
            kind: statistics.median(lines.values())
            for kind, lines in self.changed_lines.items()
            if lines
        }


def survey(folder: Path, task: str | None = None) -> Coverage:
    """What the lock of `folder` says about the installed diffusers.

    The scope is computed: every class of `pipeline_nodes`, or those whose `task_of` is
    `task`. Text to image, for example, is a `__call__` that takes a prompt (or class
    labels), needs no picture, film or sound, and returns images; `porter.tasks` says how
    each of these is read off.

    Raises:
        PorterError: the lock is no lock, or no pipeline has this task.
    """
    lock = read_lock(folder)
    tasks = pipeline_tasks()
    names = [name for name in sorted(tasks) if task in (None, tasks[name])]
    if not names:
        raise PorterError(
            f"no pipeline for {task}", expected=", ".join(sorted({*tasks.values()}))
        )
    rows = [Row(n, tasks[n], n in lock.ports, _cells(lock, n)) for n in names]
    entries = [lock.ports[name] for name in names if name in lock.ports]
    return Coverage(
        library_version(),
        task or "",
        tuple(rows),
        _rules(entries),
        {rule.id: rule.reason for rules in _PACKAGES.values() for rule in rules},
        _lines(entries),
    )


def _cells(lock: Lock, name: str) -> dict[str, Cell]:
    refusal = lock.refused.get(name)
    if refusal and refusal["diffusers"] == library_version():
        return dict.fromkeys(MODES, Cell(REFUSED, refusal["reason"]))
    if name not in lock.ports:
        todo = f"not ported; run porter add-model {name}"
        return dict.fromkeys(MODES, Cell(UNVERIFIED, todo))
    entry = lock.ports[name]
    proofs = entry.get("proofs") or {"modes": {}}
    stale = stale_reason(entry)
    if proofs["modes"] and not stale:
        key = proof_key(entry)
        changed = [part for part in key if proofs["key"].get(part) != key[part]]
        stale = f"{' and '.join(changed)} changed since" if changed else ""
    return {m: _cell(entry, proofs, stale, m) for m in MODES}


def _cell(
    entry: Mapping[str, Any], proofs: Mapping[str, Any], stale: str, mode: str
) -> Cell:
    refused: Mapping[str, str] = entry["refused_modes"]
    if reasons := [refused[kind] for kind in MODES[mode] if kind in refused]:
        return Cell(REFUSED, reasons[0])
    missing = [kind for kind in MODES[mode] if kind not in proofs["modes"]]
    refuted: Mapping[str, Any] = {} if stale else proofs.get("refuted", {})
    wrong = [found for kind in missing for found in refuted.get(kind, {}).items()]
    if wrong:
        verified, explanation = wrong[0]
        return Cell(REFUSED, f"porter verify: {verified}: {explanation}")
    if stale or missing:
        return Cell(UNVERIFIED, stale or f"no proof of {missing[0]}")
    return Cell(PROVEN)


def _classes(
    entries: Iterable[Mapping[str, Any]],
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Kind, reference and entry of every rewritten class, shared ones more than once."""
    for entry in entries:
        processors = {
            name
            for facts in entry["facts"]["transformers"].values()
            for name in facts["processors"]
        }
        for reference in entry["rules"]:
            if reference == entry["class"]:
                yield "pipeline", reference, entry
            elif reference.replace(":", ".") in processors:
                yield "attention", reference, entry
            else:
                yield "transformer", reference, entry


def _rules(
    entries: Iterable[Mapping[str, Any]],
) -> dict[str, dict[str, tuple[str, ...]]]:
    users: dict[tuple[str, str], set[str]] = defaultdict(set)
    for kind, reference, entry in _classes(entries):
        for rule in entry["rules"][reference]:
            users[kind, rule].add(reference.partition(":")[2])
    return {
        kind: {rule.id: tuple(sorted(users[kind, rule.id])) for rule in rules}
        for kind, rules in _PACKAGES.items()
    }


def _lines(entries: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {
        "pipeline": {},
        "transformer": {},
        "attention": {},
    }
    for kind, reference, entry in _classes(entries):
        found[kind][reference.partition(":")[2]] = entry["changed_lines"][reference]
    return found
