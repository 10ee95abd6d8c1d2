"""Measure one-GPU diffusers, its context parallelism, xDiT and this runtime in one run.

    python -m benchmarks.compare --models flux,sd3,pixart --sizes 1024,2048 --gpus 2

Every layout runs in processes of its own with a time limit; rounds go through all layouts in
turn. The latents of each are compared with those of one GPU. Writes results.json,
results.md and results.png into the output folder. Without a GPU the models are tiny.

Exit code: 0 when all of our own layouts ran and agree (`--gate`; with `--fp32`, where stock
diffusers is further from fp32 than that, no further than it), 1 otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks import report
from benchmarks.layouts import OURS, STOCK, Layout, layouts_for, without_peer_access
from benchmarks.models import MODELS
from benchmarks.processes import ProcessServer
from benchmarks.results import Row, add_error, add_round, is_fine
from benchmarks.worker import Job

ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    args = build_parser().parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    # Before torch is imported: the check for a GPU must not start CUDA here.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch

    on_gpu = torch.cuda.is_available() and not args.cpu
    most = max(args.gpus)
    if on_gpu and most > torch.cuda.device_count():
        print(
            f"error: --gpus {most} on {torch.cuda.device_count()} devices, expected no "
            "more than there are; ask for fewer",
            file=sys.stderr,
        )
        return 2
    if not report.can_plot():
        print(
            "note: no results.png without matplotlib (the extra plots)", file=sys.stderr
        )
    make_ports(args.models, args.generated)
    rows = [
        Row(model, size, layout)
        for model in args.models
        for size in args.sizes
        for layout in chosen_layouts(args, model, size, on_gpu)
    ]
    server = ProcessServer(args.output, args.timeout)
    for number in range(args.rounds):
        for row in rows:
            _measure(row, server, args, on_gpu)
            print(f"round {number + 1}: {report.line(row)}", flush=True)
            _write(rows, args)
    _write(rows, args)
    print((args.output / "results.md").read_text(encoding="utf-8"))
    ours = [row for row in rows if row.layout.engine == OURS]
    return 0 if all(is_fine(row, args.gate, rows) for row in ours) else 1


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="Measure this runtime and its peers side by side.",
    )
    add = parser.add_argument
    add("--models", type=_names, default=list(MODELS), help="comma-separated")
    add("--sizes", type=_numbers, default=[1024], help="pixels of each side")
    add(
        "--gpus",
        type=_numbers,
        default=[2],
        help="ranks of the parallel layouts, comma-separated (default: 2)",
    )
    add("--steps", type=int, default=12, help="denoising steps of a timed call")
    add(
        "--short_steps", type=int, default=2, help="steps of the call it is compared to"
    )
    add("--repeats", type=int, default=3, help="timed calls in a round")
    add("--rounds", type=int, default=1, help="turns through all layouts")
    add("--timeout", type=float, default=300, help="seconds for one layout")
    add(
        "--only",
        type=_patterns,
        default=[],
        help="rows that match one of these regular expressions, by comma, as they are named in "
        "the output (flux 1024 porter ulysses2 graph)",
    )
    add(
        "--no_p2p",
        "--no-p2p",
        action="store_true",
        help="all again with NCCL_P2P_DISABLE=1",
    )
    add(
        "--other_size",
        type=int,
        help="pixels of a further call at the end: the cost of another shape",
    )
    add(
        "--fp32",
        type=_names,
        nargs="?",
        const=list(MODELS),
        default=[],
        metavar="MODELS",
        help="one GPU in fp32 as well, of these models or of all, and what each row differs from "
        "it; and one GPU with layer norms in doubles, for what any other order of sums changes",
    )
    add(
        "--cpu",
        action="store_true",
        help="tiny models on CPU even where there is a GPU",
    )
    add(
        "--gate", type=float, default=0.01, help="relative L2 that exact modes may have"
    )
    add("--generated", default="generated", metavar="DIR", help="folder of the ports")
    add("--output", type=Path, default=Path("benchmark-results"), metavar="DIR")
    return parser


def chosen_layouts(
    args: argparse.Namespace, model: str, size: int, on_gpu: bool
) -> list[Layout]:
    """The layouts of a model that the flags ask for; with any also stock on one GPU."""
    from benchmarks import engines

    found = [
        layout
        for num_ranks in dict.fromkeys([1, *args.gpus])
        for layout in layouts_for(
            MODELS[model],
            num_ranks,
            # Its device mesh needs GPUs.
            has_context_parallel=on_gpu and engines.has_context_parallel(MODELS[model]),
            has_xfuser=on_gpu and engines.has_xfuser(),
            on_gpu=on_gpu,
        )
    ]
    if args.no_p2p:
        found += without_peer_access(found)
    chosen = [
        layout
        for layout in found
        if not args.only
        or any(x.search(f"{model} {size} {layout.name}") for x in args.only)
    ]
    if not chosen:
        return []
    stock, rest = found[0], [layout for layout in chosen if layout != found[0]]
    if model not in args.fp32:
        return [stock, *rest]
    precise, exact = replace(stock, precise=True), replace(stock, exact_norms=True)
    return [precise, stock, exact, *rest]


def make_ports(models: Sequence[str], generated: str) -> None:
    """Make the ports that are missing, where porter is installed."""
    lock = Path(generated) / "porter.lock"
    held = (
        json.loads(lock.read_text(encoding="utf-8"))["ports"] if lock.is_file() else {}
    )
    missing = [
        MODELS[m].pipeline
        for m in models
        if MODELS[m].pipeline not in held
        or not all(
            (Path(generated) / p).is_file() for p in held[MODELS[m].pipeline]["outputs"]
        )
    ]
    if missing:
        command = [sys.executable, "-m", "porter", "add-model", *missing]
        subprocess.run([*command, "--output", generated], check=True)


def _measure(
    row: Row, server: ProcessServer, args: argparse.Namespace, on_gpu: bool
) -> None:
    folder: Path = args.output
    # Compiled code rounds otherwise: each is held to one GPU with the same kernels.
    kernels = "compiled" if row.layout.compiled else "eager"
    kernels = "fp32" if row.layout.precise else kernels
    reference = folder / f"{row.model}-{row.size}.{kernels}.pt"
    latents = _latents_of(folder, row, row.layout)
    latents.unlink(missing_ok=True)
    outcome = server.run(
        Job(
            model=row.model,
            layout=row.layout,
            size=row.size,
            steps=args.steps,
            short_steps=args.short_steps,
            repeats=1 if row.layout.is_of_rounding else args.repeats,
            tiny=not on_gpu,
            device="cuda" if on_gpu else "cpu",
            generated=str(args.generated),
            result=latents.with_suffix(".json"),
            latents=latents,
            other_size=args.other_size,
        )
    )
    if outcome.result is None:
        add_error(row, outcome.error or "failed")
        return
    if row.layout.engine == STOCK and not row.layout.exact_norms:
        latents.replace(reference)
        latents = reference
    add_round(row, outcome, args.steps - args.short_steps, args.steps)
    row.difference = relative_difference(latents, reference)
    # The row of one GPU is measured before those of several.
    alone = replace(row.layout, mode="one", num_ranks=1, degrees={}, environment={})
    row.spread = relative_difference(latents, _latents_of(folder, row, alone))
    precise = folder / f"{row.model}-{row.size}.fp32.pt"
    if row.model in args.fp32:
        row.rounding = relative_difference(latents, precise)


def _latents_of(folder: Path, row: Row, layout: Layout) -> Path:
    """Where a layout leaves its latents of a row's model and size."""
    return folder / f"{row.model}-{row.size}-{layout.name.replace(' ', '-')}.pt"


def relative_difference(found: Path, reference: Path) -> float | None:
    """||found - reference|| / ||reference||; None where one is missing."""
    import torch

    if not (found.is_file() and reference.is_file()):
        return None
    a, b = torch.load(found), torch.load(reference)
    return float((a - b).norm() / b.norm())


def _write(rows: list[Row], args: argparse.Namespace) -> None:
    about = machine()
    about["command"] = (
        f"python -m benchmarks.compare --models {','.join(args.models)} --sizes "
        f"{','.join(map(str, args.sizes))} "
        f"--gpus {','.join(map(str, args.gpus))} --steps {args.steps} "
        f"--repeats {args.repeats} --rounds {args.rounds}"
        + (f" --only {','.join(x.pattern for x in args.only)}" if args.only else "")
        + (" --no_p2p" if args.no_p2p else "")
        + (f" --fp32 {','.join(args.fp32)}" if args.fp32 else "")
        + (f" --other_size {args.other_size}" if args.other_size else "")
    )
    data = {"about": about, "rows": [asdict(row) for row in rows]}
    path = args.output / "results.json"
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")
    text = report.markdown(rows, about)
    (args.output / "results.md").write_text(text, encoding="utf-8")
    if report.can_plot():
        report.plot(rows, args.output / "results.png")


def machine() -> dict[str, str]:
    """Date, device and versions."""
    import torch

    device = "CPU"
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=False)
        names = found.stdout.split("\n")[:-1]
        device = f"{len(names)} x {names[0]}" if names else "CUDA"
    versions = {"torch": torch.__version__}
    for package in ("diffusers", "xfuser", "flash-attn", "flash-attn-4"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "date": datetime.date.today().isoformat(),
        "device": device,
        **versions,
    }


def _names(text: str) -> list[str]:
    found = [name for name in text.split(",") if name]
    for name in found:
        if name not in MODELS:
            raise argparse.ArgumentTypeError(
                f"{name!r}, expected one of {', '.join(MODELS)}"
            )
    return found


def _patterns(text: str) -> list[re.Pattern[str]]:
    try:
        return [re.compile(part) for part in text.split(",") if part]
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}, expected regular expressions: {error}"
        ) from error


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


if __name__ == "__main__":
    sys.exit(main())
