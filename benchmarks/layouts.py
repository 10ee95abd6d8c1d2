"""What is measured: engines, their parallel layouts, and the options that change speed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from benchmarks.models import BenchmarkModel

#: Engines, in the order of the tables.
STOCK, CONTEXT_PARALLEL, XDIT, OURS = "diffusers", "diffusers-cp", "xfuser", "porter"


@dataclass(frozen=True)
class Layout:
    """One row of a table.

    Args:
        engine: who runs it.
        mode: name of the parallel mode, `one` for one process.
        num_ranks: processes, one a GPU.
        degrees: fields of the engine's configuration.
        compiled: blocks go through torch.compile.
        fused: our larger operations in blocks that are not compiled.
        graph: our transformer calls are captured.
        environment: further variables of the processes.
        precise: all numbers are fp32; what rounding costs the others is measured against it.
        exact_norms: layer norms compute in doubles and nothing else changes: what it differs by,
            any other order of sums does.
    """

    engine: str
    mode: str
    num_ranks: int = 1
    degrees: dict[str, Any] = field(default_factory=dict)
    compiled: bool = False
    fused: bool = False
    graph: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    precise: bool = False
    exact_norms: bool = False

    @property
    def is_of_rounding(self) -> bool:
        """Whether the row is there for its result, not for its time."""
        return self.precise or self.exact_norms

    @property
    def name(self) -> str:
        """For tables: `porter ulysses2 graph compiled`."""
        words = [self.engine, self.mode]
        words += ["graph"] if self.graph else []
        words += ["fused"] if self.fused else []
        words += ["compiled"] if self.compiled else []
        words += ["fp32"] if self.precise else []
        words += ["exact-norms"] if self.exact_norms else []
        words += ["no-p2p"] if "NCCL_P2P_DISABLE" in self.environment else []
        return " ".join(words)


def layouts_for(
    model: BenchmarkModel,
    num_ranks: int,
    *,
    has_context_parallel: bool,
    has_xfuser: bool,
    on_gpu: bool,
) -> list[Layout]:
    """All layouts of a model on `num_ranks` GPUs."""
    variants = [False, True] if on_gpu else [False]
    if num_ranks == 1:
        stock = [Layout(STOCK, "one", compiled=compiled) for compiled in variants]
        return stock + _ours("one", 1, {}, on_gpu=on_gpu)
    found: list[Layout] = []
    if has_context_parallel:
        for mode in ("ulysses", "ring"):
            found += [
                Layout(
                    CONTEXT_PARALLEL,
                    f"{mode}{num_ranks}",
                    num_ranks,
                    {f"{mode}_degree": num_ranks},
                    compiled=compiled,
                )
                for compiled in variants
            ]
    legal = modes(model, num_ranks, tiny=not on_gpu)
    if has_xfuser:
        found += [
            Layout(XDIT, mode, num_ranks, degrees, compiled)
            for mode, degrees in legal
            for compiled in variants
            if not (compiled and "pipefusion" in mode)
        ]
    for mode, degrees in legal:
        found += _ours(mode, num_ranks, degrees, on_gpu=on_gpu)
    return found


def _ours(
    mode: str, num_ranks: int, degrees: dict[str, Any], *, on_gpu: bool
) -> list[Layout]:
    """Our rows of a mode: as the code is, with larger operations, compiled."""
    plain = Layout(OURS, mode, num_ranks, degrees, graph=on_gpu)
    if not on_gpu:
        return [plain]
    return [plain, replace(plain, fused=True), replace(plain, compiled=True)]


def modes(
    model: BenchmarkModel, num_ranks: int, *, tiny: bool = False
) -> list[tuple[str, dict[str, Any]]]:
    """Every legal way to use all ranks for one image, by xDiT's field names.

    Guidance splits in two where the model sees both branches, a stage needs a block.
    """
    found: list[tuple[int, str, dict[str, Any]]] = []
    for guidance in (2, 1) if model.guided else (1,):
        if num_ranks % guidance:
            continue
        rest = num_ranks // guidance
        for stages, ulysses in product(_divisors(rest), _divisors(rest)):
            if rest % (stages * ulysses) or stages > model.num_blocks(tiny=tiny):
                continue
            degrees = {
                "pipefusion": stages,
                "ulysses": ulysses,
                "ring": rest // (stages * ulysses),
            }
            used = {name: n for name, n in degrees.items() if n > 1}
            words = ["cfg2"] if guidance == 2 else []
            words += [f"{name}{n}" for name, n in used.items()]
            fields: dict[str, Any] = {"use_cfg_parallel": True} if guidance == 2 else {}
            fields |= {f"{_FIELDS[name]}_degree": n for name, n in used.items()}
            found.append((len(words), " ".join(words), fields))
    # Plain modes first, as they come.
    return [(mode, fields) for _, mode, fields in sorted(found, key=lambda x: x[0])]


#: xDiT's names of the degrees.
_FIELDS = {
    "pipefusion": "pipefusion_parallel",
    "ulysses": "ulysses",
    "ring": "ring",
}


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def without_peer_access(layouts: list[Layout]) -> list[Layout]:
    """The layouts of several ranks again, as machines without peer access run them."""
    return [
        replace(x, environment={**x.environment, "NCCL_P2P_DISABLE": "1"})
        for x in layouts
        if x.num_ranks > 1
    ]
