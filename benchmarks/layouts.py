"""What is measured: engines, their parallel layouts, and the options that change speed."""

from __future__ import annotations

from dataclasses import dataclass, field
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
        graph: our transformer calls are captured.
        environment: further variables of the processes.
    """

    engine: str
    mode: str
    num_ranks: int = 1
    degrees: dict[str, Any] = field(default_factory=dict)
    compiled: bool = False
    graph: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For tables: `porter ulysses2 graph compiled`."""
        words = [self.engine, self.mode]
        words += ["graph"] if self.graph else []
        words += ["compiled"] if self.compiled else []
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
    """All layouts of a model on up to `num_ranks` GPUs; the one-GPU rows come first."""
    variants = [False, True] if on_gpu else [False]
    found = [Layout(STOCK, "one", compiled=compiled) for compiled in variants]
    found += [
        Layout(OURS, "one", compiled=compiled, graph=on_gpu) for compiled in variants
    ]
    if num_ranks == 1:
        return found
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
    for engine in (XDIT, OURS) if has_xfuser else (OURS,):
        for mode, degrees in modes(model, num_ranks):
            for compiled in variants:
                if compiled and mode.startswith("pipefusion"):
                    continue
                graph = on_gpu and engine == OURS and not mode.startswith("pipefusion")
                found.append(
                    Layout(engine, mode, num_ranks, degrees, compiled, graph=graph)
                )
    return found


def modes(model: BenchmarkModel, num_ranks: int) -> list[tuple[str, dict[str, Any]]]:
    """Legal ways to use all ranks for one image, by xDiT's field names."""
    found: list[tuple[str, dict[str, Any]]] = []
    rest = num_ranks
    guidance: dict[str, Any] = {}
    prefix = ""
    if model.guided and num_ranks % 2 == 0:
        guidance, prefix, rest = {"use_cfg_parallel": True}, "cfg2", num_ranks // 2
    if rest == 1 and guidance:
        found.append((prefix, guidance))
    splits = [({}, "", num_ranks)]
    if guidance and rest > 1:
        splits.append((guidance, f"{prefix} ", rest))
    for base, start, degree in splits:
        found += [
            (f"{start}ulysses{degree}", {**base, "ulysses_degree": degree}),
            (f"{start}ring{degree}", {**base, "ring_degree": degree}),
            (
                f"{start}pipefusion{degree}",
                {**base, "pipefusion_parallel_degree": degree},
            ),
        ]
        if degree >= 4 and degree % 2 == 0:
            half = {"ulysses_degree": 2, "ring_degree": degree // 2}
            found.append((f"{start}ulysses2 ring{degree // 2}", {**base, **half}))
    return found


def without_peer_access(layouts: list[Layout]) -> list[Layout]:
    """The layouts of several ranks again, as machines without peer access run them."""
    return [
        Layout(
            x.engine,
            x.mode,
            x.num_ranks,
            x.degrees,
            x.compiled,
            x.graph,
            {**x.environment, "NCCL_P2P_DISABLE": "1"},
        )
        for x in layouts
        if x.num_ranks > 1
    ]
