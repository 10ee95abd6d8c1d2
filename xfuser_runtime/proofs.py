"""Which parallel modes of a port are proven, and the refusal of all others.

A proof is kept per kind of splitting, without its degree, and per pair of kinds.  A product
of modes is offered when every kind in it and every pair of them is proven.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from pathlib import Path

from xfuser_runtime.config import EngineConfig
from xfuser_runtime.errors import NotSupportedError

#: Kinds of splitting in the order in which a proof's name multiplies them.
KINDS = ("dp", "cfg", "pp", "pipefusion", "ring", "ulysses")
#: What no run of a verification computes with: the command line, the judgement of proofs, the
#: ranks of a verification, and what only GPUs reach.  A proof outlives their changes.
_NOT_COMPUTING = ("run.py", "proofs.py", "replay/", "cuda/")


class UnprovenWarning(UserWarning):
    """A mode without a proof runs because it was allowed to."""


@dataclass(frozen=True)
class Proofs:
    """The valid proofs of one port.

    Attributes:
        port: name of the pipeline, as given to porter.
        modes: proven kinds and pairs, for example `cfg` or `cfg x ulysses`.
        stale: why the lock's proofs do not hold here; empty where they do.
        refused: kind to the reason why the port lacks it.
    """

    port: str
    modes: frozenset[str]
    stale: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)

    def check_proven(self, engine_config: EngineConfig) -> None:
        """Refuse a configuration with a mode that the port lacks or that is not proven.

        Raises:
            NotSupportedError: a mode is lacking; or unproven, and `allow_unproven` does not
                make that a warning.
        """
        needed = list(needed_proofs(engine_config))
        proven = ", ".join(sorted(filter(self._has, self.modes))) or "none"
        refuse_lacking(
            self.port,
            self.refused,
            needed,
            f", expected one of the proven modes: {proven}",
        )
        missing = [mode for mode in needed if not self._has(mode)]
        if not missing:
            return
        text = (
            f"{self.port}: {_plural('mode', missing)} not proven"
            f"{f' ({self.stale})' if self.stale else ''}, expected one of the proven "
            f"modes: {proven}; run `porter verify {self.port}`"
        )
        if not engine_config.runtime_config.allow_unproven:
            raise NotSupportedError(f"{text} or pass --allow_unproven")
        warnings.warn(text, UnprovenWarning, stacklevel=2)

    def _has(self, mode: str) -> bool:
        return not self.stale and mode in self.modes


def refuse_lacking(
    port: str, refused: Mapping[str, str], modes: Iterable[str], expected: str = ""
) -> None:
    """Refuse the first of `modes` that a port lacks.

    Raises:
        NotSupportedError: with porter's reason.
    """
    for mode in modes:
        if mode in refused:
            raise NotSupportedError(
                f"{port}: mode `{mode}` was refused by porter ({refused[mode]}){expected}"
            )


def needed_proofs(engine_config: EngineConfig) -> Iterator[str]:
    """The kinds that a configuration uses, then their pairs, by the names of proofs."""
    kinds = used_kinds(engine_config)
    yield from kinds
    yield from (" x ".join(pair) for pair in combinations(kinds, 2))


def used_kinds(engine_config: EngineConfig) -> tuple[str, ...]:
    """The kinds of splitting that a configuration uses, a subset of `KINDS`.

    Stages with one patch are whole passes in every step; with more they are PipeFusion.
    """
    parallel = engine_config.parallel_config
    patches = engine_config.runtime_config.num_pipeline_patch
    used = {
        "dp": parallel.data_parallel_degree > 1,
        "cfg": parallel.use_cfg_parallel,
        "pp": parallel.pipefusion_parallel_degree > 1 and patches == 1,
        "pipefusion": parallel.pipefusion_parallel_degree > 1 and patches > 1,
        "ring": parallel.ring_degree > 1,
        "ulysses": parallel.ulysses_degree > 1,
    }
    return tuple(kind for kind in KINDS if used[kind])


@cache
def runtime_sha256() -> str:
    """`source_sha256` of the runtime itself."""
    return source_sha256(Path(__file__).parent)


def source_sha256(root: Path) -> str:
    """SHA-256 over the paths and texts of the source below `root` that computes a run."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not name.startswith(_NOT_COMPUTING):
            digest.update(name.encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def _plural(noun: str, names: list[str]) -> str:
    quoted = ", ".join(f"`{name}`" for name in names)
    return f"{noun} {quoted} is" if len(names) == 1 else f"{noun}s {quoted} are"
