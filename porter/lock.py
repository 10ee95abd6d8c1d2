"""`porter.lock`: what each port was made from, what it holds and what is proven.

The file is JSON with sorted keys, except below `facts`. For each port, under `ports.<name>`:

- `class`: the upstream class as `module:Class`; `generated`: file and class to load;
- `diffusers`, `porter`: versions;
- `upstream`: sha256 of every upstream symbol that the generated code uses;
- `rules`: for each rewritten class, rule id to number of matches;
- `outputs`: sha256 of each generated file, by path below the lock's folder;
- `facts`: what the probe measured, so that a check needs no run;
- `refused_modes`: mode to the reason why the port lacks it;
- `override`: the subclass passed with `--with`, or null;
- `changed_lines`: for each rewritten class, how many lines differ from upstream's;
- `proofs`: null, or `key` (see `proof_key`), `modes` with what was measured, and `refuted`
  with what verification found wrong, both by what is proven and mode.

Under `refused.<name>`, where a run over all pipelines refused some: `reason` and the
`diffusers` that it was found in.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from porter.errors import PorterError
from porter.source import library_version, sha256
from xfuser_runtime.proofs import runtime_sha256

LOCK_NAME = "porter.lock"
_VERSION = 1


@dataclass(frozen=True)
class Lock:
    """The ports by name, and what was refused; entries are plain JSON."""

    ports: Mapping[str, Mapping[str, Any]]
    refused: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def with_port(self, name: str, entry: Mapping[str, Any]) -> Lock:
        """A lock with one more port, or with a newer entry of it.

        The proofs of the old entry stay where their key still holds.
        """
        proofs = self.ports.get(name, {}).get("proofs")
        if proofs and proofs["key"] != proof_key({**entry}):
            proofs = None
        refused = {key: value for key, value in self.refused.items() if key != name}
        ports = {**self.ports, name: {**entry, "proofs": proofs}}
        return replace(self, ports=ports, refused=refused)

    def without_port(self, name: str) -> Lock:
        """A lock that lacks this port."""
        ports = {key: value for key, value in self.ports.items() if key != name}
        return replace(self, ports=ports)

    def with_refusal(self, name: str, reason: str) -> Lock:
        """A lock that also says why this class cannot be ported."""
        entry = {"diffusers": library_version(), "reason": reason}
        return replace(self, refused={**self.refused, name: entry})

    def with_proofs(
        self,
        name: str,
        modes: Mapping[str, Any],
        refuted: Mapping[str, Mapping[str, str]] | None = None,
    ) -> Lock:
        """A lock that also holds what a verification of this port found.

        Args:
            name: of the port.
            modes: what is proven, each with what was measured by mode; what other modes
                measured of the same stays.
            refuted: what is not, each with what was wrong by mode; it is proven once all of
                these modes are.
        """
        refuted = refuted or {}
        entry = self.ports[name]
        key = proof_key(entry)
        old = entry.get("proofs")
        if not old or old["key"] != key:
            old = {"modes": {}}
        was_wrong, wrong = old.get("refuted", {}), {}
        for proof in {**was_wrong, **refuted}:
            still = _except(was_wrong.get(proof, {}), modes.get(proof, ()))
            if found := {**still, **refuted.get(proof, {})}:
                wrong[proof] = found
        kept = _except(old["modes"], wrong)
        added = {
            proof: {**kept.get(proof, {}), **measured}
            for proof, measured in _except(modes, wrong).items()
        }
        proofs = {"key": key, "modes": {**kept, **added}, "refuted": wrong}
        return replace(self, ports={**self.ports, name: {**entry, "proofs": proofs}})

    def known_outputs(self) -> dict[str, str]:
        """sha256 of every generated file."""
        known: dict[str, str] = {}
        for entry in self.ports.values():
            known.update(entry["outputs"])
        return known

    def text(self) -> str:
        """The file's text; equal locks have equal texts."""
        data: dict[str, Any] = {"version": _VERSION, "ports": self.ports}
        if self.refused:
            data["refused"] = self.refused
        return json.dumps(_sorted(data), indent=2, ensure_ascii=False) + "\n"


def _except(found: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name not in names}


def _sorted(value: Any) -> Any:
    """The value with sorted keys, but for facts: the generated code follows their order."""
    if not isinstance(value, Mapping):
        return value
    return {k: value[k] if k == "facts" else _sorted(value[k]) for k in sorted(value)}


def read_lock(folder: Path) -> Lock:
    """The lock of an output folder; an empty one where there is no file.

    Raises:
        PorterError: the file is not a lock that this version reads.
    """
    path = folder / LOCK_NAME
    if not path.exists():
        return Lock({})
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] == _VERSION:
            return Lock(data["ports"], data.get("refused", {}))
    except (ValueError, KeyError, TypeError):
        pass
    raise PorterError(
        f"{path.as_posix()} is no lock of version {_VERSION}",
        expected="a file that porter wrote",
        todo="delete it and run porter add-model again",
    )


def proof_key(entry: Mapping[str, Any]) -> dict[str, str]:
    """What a proof depends on: outputs, diffusers, the runtime's source, torch."""
    outputs = "\n".join(
        f"{path} {sha}" for path, sha in sorted(entry["outputs"].items())
    )
    torch = importlib.metadata.version("torch").split("+")[0]
    return {
        "outputs": sha256(outputs),
        "diffusers": entry["diffusers"],
        "runtime": runtime_sha256(),
        "torch": ".".join(torch.split(".")[:2]),
    }


def stale_reason(entry: Mapping[str, Any]) -> str:
    """Why a port does not fit the installed diffusers, or ''."""
    if entry["diffusers"] != library_version():
        return f"made from diffusers {entry['diffusers']}, installed is {library_version()}"
    return ""
