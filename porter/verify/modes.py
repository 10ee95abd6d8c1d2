"""The parallel modes that are verified: every way of splitting, and every product of two.

A mode's name multiplies its factors, fixed order, for example `cfg2 x ulysses2`.  A
`pipefusion` factor names its stages and patches: `pipefusion2/3` is 2 stages, 3 patches and
one warm-up step.  `pp2` is 2 stages with every step as warm-up, and `pp2/1` is 2 stages with
one patch after one warm-up step; both equal one device.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from porter.errors import PorterError

#: Ways of splitting, in the order in which a name multiplies them.
KINDS = ("dp", "cfg", "pp", "pipefusion", "ring", "ulysses")
_FACTOR = re.compile(r"(dp|cfg|pp|ring|ulysses)(\d+)|(pipefusion|pp)(\d+)/(\d+)")
#: Ranks of the largest layout that one host has; a mode named by hand takes no more.
MAX_RANKS = 8


@dataclass(frozen=True)
class Mode:
    """One layout of the ranks.

    Attributes:
        dp, cfg, pp, ring, ulysses: the degrees.
        patches: patches after one warm-up step; 0 where every step is warm-up.
    """

    dp: int = 1
    cfg: int = 1
    pp: int = 1
    ring: int = 1
    ulysses: int = 1
    patches: int = 0

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.dp * self.cfg * self.pp * self.ring * self.ulysses

    @property
    def is_displaced(self) -> bool:
        """PipeFusion: the result is that of displaced patches, not that of one device."""
        return self.patches > 1

    @property
    def kinds(self) -> tuple[str, ...]:
        """The ways of splitting that this mode uses, a subset of `KINDS` in its order."""
        stages = "pipefusion" if self.is_displaced else "pp"
        used = {
            "dp": self.dp > 1,
            "cfg": self.cfg > 1,
            stages: self.pp > 1,
            "ring": self.ring > 1,
            "ulysses": self.ulysses > 1,
        }
        return tuple(kind for kind in KINDS if used.get(kind))

    @property
    def name(self) -> str:
        """The factors, multiplied; `parse_mode` reads it."""
        degrees = {
            "dp": f"dp{self.dp}",
            "cfg": f"cfg{self.cfg}",
            "pp": f"pp{self.pp}/1" if self.patches else f"pp{self.pp}",
            "pipefusion": f"pipefusion{self.pp}/{self.patches}",
            "ring": f"ring{self.ring}",
            "ulysses": f"ulysses{self.ulysses}",
        }
        return " x ".join(degrees[kind] for kind in self.kinds)

    @property
    def proof(self) -> str:
        """What the mode proves: its kinds without degrees, for example `cfg x ulysses`."""
        return " x ".join(self.kinds)

    def warmup_steps(self, num_steps: int) -> int:
        """Whole steps before the patches, of `num_steps` loop iterations."""
        return 1 if self.patches else num_steps

    def arguments(self, num_steps: int) -> dict[str, Any]:
        """Keyword arguments of the runtime's `xFuserArgs` for this mode."""
        return {
            "data_parallel_degree": self.dp,
            "use_cfg_parallel": self.cfg == 2,
            "ulysses_degree": self.ulysses,
            "ring_degree": self.ring,
            "pipefusion_parallel_degree": self.pp,
            "num_pipeline_patch": self.patches or 1,
            "warmup_steps": self.warmup_steps(num_steps),
            "allow_unproven": True,
        }


_SINGLES = (
    Mode(dp=2),
    Mode(cfg=2),
    Mode(ulysses=2),
    Mode(ulysses=4),
    Mode(ring=2),
    Mode(ring=4),
    Mode(pp=2),
    Mode(pp=2, patches=1),
    Mode(pp=4),
)
#: One mode for each way of splitting, and the two of tokens together: what a sweep over
#: many ports runs, and what the columns of `porter coverage` ask for.
CORE = (
    Mode(dp=2),
    Mode(cfg=2),
    Mode(ulysses=2),
    Mode(ring=2),
    Mode(ring=2, ulysses=2),
    Mode(pp=2),
    Mode(pp=2, patches=2),
)
#: The same, those that show most of a port first: replicas compute what one rank does, and
#: guidance moves least of the model.
TELLING = tuple(sorted(CORE, key=lambda mode: (mode.dp > 1, mode.cfg > 1)))
_PIPEFUSION = (
    Mode(pp=2, patches=2),
    Mode(pp=2, patches=3),
    Mode(pp=2, patches=4),
    Mode(cfg=2, pp=2, patches=2),
    Mode(cfg=2, pp=2, patches=3),
    Mode(pp=2, ulysses=2, patches=2),
    Mode(pp=2, ulysses=2, patches=3),
    Mode(pp=2, ring=2, patches=2),
    Mode(dp=2, pp=2, patches=2),
)


def all_modes() -> tuple[Mode, ...]:
    """Single ways of splitting, products of two, and PipeFusion, on four ranks at most."""
    degrees = ("dp", "cfg", "pp", "ring", "ulysses")
    products = (Mode(**{a: 2, b: 2}) for a, b in combinations(degrees, 2))
    return (*_SINGLES, *products, *_PIPEFUSION)


def parse_modes(names: Sequence[str]) -> tuple[Mode, ...]:
    """The modes of a command line: names, or kinds that stand for all modes of theirs alone.

    Raises:
        PorterError: a name is none.
    """
    found: list[Mode] = []
    for name in names:
        alone = [mode for mode in all_modes() if mode.proof == name.strip()]
        found += alone or [parse_mode(name)]
    return tuple(dict.fromkeys(found))


def parse_mode(name: str) -> Mode:
    """Read a mode's name, factors in any order: `ulysses2xcfg2`, `pipefusion2/3`.

    Raises:
        PorterError: it is none, or takes more than `MAX_RANKS` ranks.
    """
    degrees: dict[str, int] = {}
    factors = re.split(r"\s*x\s*", name.strip())
    for factor in factors:
        match = _FACTOR.fullmatch(factor)
        if match is None:
            raise _unknown(name)
        if match[3] and (match[3] == "pp") is (match[5] == "1"):
            degrees |= {"pp": int(match[4]), "patches": int(match[5])}
        elif match[1]:
            degrees[match[1]] = int(match[2])
    mode = Mode(**degrees)
    if (
        sorted(mode.name.split(" x ")) != sorted(factors)
        or not 2 <= mode.world_size <= MAX_RANKS
        or mode.cfg > 2
    ):
        raise _unknown(name)
    return mode


def _unknown(name: str) -> PorterError:
    names = ", ".join(mode.name for mode in all_modes())
    return PorterError(
        found=f"mode {name!r}",
        expected=f"factors {', '.join(KINDS)} with their degrees, {MAX_RANKS} ranks at most",
        todo=f"name some of: {names}",
    )
