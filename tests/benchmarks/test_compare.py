"""The command on tiny models, and the figures that its tables show."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from benchmarks import report
from benchmarks.compare import (
    build_parser,
    chosen_layouts,
    main,
    relative_difference,
)
from benchmarks.layouts import (
    CONTEXT_PARALLEL,
    OURS,
    STOCK,
    Layout,
    layouts_for,
    modes,
)
from benchmarks.models import MODELS, build_pipeline, draw_weights
from benchmarks.results import Row, best_peer, best_single, is_fine, is_slower


def row(engine: str, mode: str, ms: float, *, compiled: bool = False) -> Row:
    ranks = 1 if mode == "one" else 2
    layout = Layout(engine, mode, ranks, compiled=compiled)
    return Row("flux", 1024, layout, step_ms=[ms], call_ms=[ms], difference=0.0)


def test_a_run_on_cpu(tmp_path: Path) -> None:
    """Every layout in processes of its own, equal to one process; files are written."""
    arguments = ["--models", "pixart", "--sizes", "256", "--gpus", "2", "--cpu"]
    arguments += [
        "--steps",
        "3",
        "--repeats",
        "1",
        "--gate",
        "1e-4",
        "--timeout",
        "100",
    ]
    folders = [
        "--generated",
        str(tmp_path / "ports"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, *folders]) == 0
    data = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    found = {(r["layout"]["engine"], r["layout"]["mode"]) for r in data["rows"]}
    names = ("one", "cfg2", "ulysses2", "ring2", "pipefusion2")
    assert found == {(STOCK, "one"), *((OURS, name) for name in names)}
    assert all(r["error"] is None and r["step_ms"] for r in data["rows"])
    # What several ranks add to the engine's own result; PipeFusion reads older keys by design.
    added = {r["layout"]["mode"]: r["spread"] for r in data["rows"][1:]}
    assert added["one"] == 0 and added["pipefusion2"] > 1e-5
    assert all(added[mode] < 1e-5 for mode in ("cfg2", "ulysses2", "ring2"))
    text = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert "| diffusers one " in text and "| porter ulysses2 " in text
    with Image.open(tmp_path / "out" / "results.png") as picture:
        assert picture.format == "PNG" and picture.height == 600


def test_no_plot_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said, and the tables are written."""
    monkeypatch.setattr(report, "can_plot", lambda: False)
    nothing = ["--models", "", "--cpu", "--output", str(tmp_path)]
    assert main(nothing) == 0
    assert "no results.png without matplotlib" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "results.json",
        "results.md",
    ]


def test_the_plot_has_no_rows_of_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bar of fp32 would dwarf the others."""
    drawn: list[list[str]] = []
    monkeypatch.setattr(Axes, "barh", lambda _, names, *__, **___: drawn.append(names))
    precise = row(STOCK, "one", 900)
    precise.layout = replace(precise.layout, precise=True)
    report.plot(
        [precise, row(STOCK, "one", 180), row(OURS, "one", 170)], tmp_path / "x"
    )
    assert drawn == [["porter one", "diffusers one"]]


def test_more_ranks_and_no_peer_access(tmp_path: Path) -> None:
    """Two numbers of ranks in one table, products of modes, and the cost of another size."""
    only = "cfg2 ulysses2,pipefusion2 ulysses2,ulysses2 ring2"
    arguments = ["--models", "pixart", "--sizes", "128", "--gpus", "2,4", "--cpu"]
    arguments += ["--steps", "3", "--repeats", "1", "--gate", "1e-4", "--no-p2p"]
    arguments += ["--only", only, "--other_size", "192", "--timeout", "100", "--fp32"]
    folders = ["--generated", str(tmp_path / "ports"), "--output", str(tmp_path)]
    assert main([*arguments, *folders]) == 0
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]
    found = [(r["layout"]["mode"], bool(r["layout"]["environment"])) for r in rows]
    names = ["cfg2 ulysses2", "ulysses2 ring2", "pipefusion2 ulysses2"]
    expected = [(name, access) for access in (False, True) for name in names]
    assert found == [*[("one", False)] * 3, *expected]
    exact = rows[2]
    assert exact["layout"]["exact_norms"] and 1e-9 < exact["difference"] < 1e-5
    # On CPU stock diffusers is fp32 in any case.
    assert all(r["rounding"] == pytest.approx(r["difference"], abs=1e-9) for r in rows)
    assert all(r["error"] is None and r["reshape_s"] is not None for r in rows)
    # Our own row of one rank was not asked for.
    assert all(r["spread"] is None for r in rows if r["layout"]["engine"] == OURS)
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| porter cfg2 ulysses2 no-p2p " in text and "--gpus 2,4" in text


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_every_legal_layout_is_there_once(name: str, num_ranks: int) -> None:
    found = [degrees for _, degrees in modes(MODELS[name], num_ranks)]
    assert len({tuple(sorted(degrees.items())) for degrees in found}) == len(found)
    # Ordered ways to write the ranks as a product of three degrees, with guidance or without.
    parts = {1: 1, 2: 3, 4: 6, 8: 10}
    ways = parts[num_ranks] + (parts[num_ranks // 2] if MODELS[name].guided else 0)
    assert len(found) == ways


def test_a_stage_needs_a_block() -> None:
    tiny = [mode for mode, _ in modes(MODELS["flux"], 8, tiny=True)]
    assert "pipefusion8" not in tiny and "pipefusion4 ulysses2" in tiny


@pytest.mark.parametrize("name", list(MODELS))
def test_blocks_are_counted_as_they_are(name: str) -> None:
    pipeline = build_pipeline(MODELS[name], torch.device("cpu"), tiny=True)
    lists = ("transformer_blocks", "single_transformer_blocks")
    blocks = sum(len(getattr(pipeline.transformer, held, [])) for held in lists)
    assert blocks == MODELS[name].num_blocks(tiny=True)


def test_the_best_of_each_side() -> None:
    rows = [
        row(STOCK, "one", 180),
        row(STOCK, "one", 140, compiled=True),
        row(CONTEXT_PARALLEL, "ulysses2", 170),
        row(CONTEXT_PARALLEL, "ulysses2", 100, compiled=True),
        row(OURS, "ulysses2", 80, compiled=True),
        row(OURS, "one", 178),
        row(OURS, "ring2", 150),
    ]
    assert best_single(rows) == 140
    assert best_peer(rows) == 100 and best_peer(rows, compiled=False) == 170
    assert best_peer(rows, like=rows[4]) == 100
    more = row(OURS, "ulysses4", 50)
    more.layout = Layout(OURS, "ulysses4", 4)
    assert best_peer(rows, like=more) is None
    assert [is_slower(r, rows) for r in rows[4:]] == [False, False, True]
    table = report.table(rows)
    assert "| porter ulysses2 compiled | 80.0 | 1.75x | 1.25x |" in table
    assert "| porter ring2 **(slower than one GPU)** | 150.0 |" in table
    # Of ours on several GPUs the one that is not compiled, to the peer that is not.
    assert (
        "Without compiling: porter ring2 is 1.13x of the best peer, 170.0 ms." in table
    )
    assert "Without compiling" not in report.table(rows[:3])


@pytest.mark.parametrize(
    ("only", "model", "expected"),
    [
        ("", "flux", 5),
        ("flux 128 porter", "flux", 5),
        ("flux 128 porter", "sd3", 0),
        ("porter ring2$,porter one$", "flux", 3),
    ],
)
def test_rows_are_chosen_by_their_names(only: str, model: str, expected: int) -> None:
    args = build_parser().parse_args(["--gpus", "2", "--only", only])
    found = chosen_layouts(args, model, 128, on_gpu=False)
    assert len(found) == expected
    assert not found or found[0] == Layout(STOCK, "one")


def test_rows_for_rounding_stand_beside_stock() -> None:
    args = build_parser().parse_args(["--gpus", "2", "--fp32", "sd3"])
    found = chosen_layouts(args, "sd3", 128, on_gpu=False)[:3]
    assert [x.name for x in found] == [
        *("diffusers one fp32", "diffusers one", "diffusers one exact-norms")
    ]
    assert not any(x.is_of_rounding for x in chosen_layouts(args, "flux", 128, False))
    rows = [row(STOCK, "one", 9 - number) for number in range(3)]
    for made, layout in zip(rows, found, strict=True):
        made.layout = layout
    assert best_single(rows) == 8 and not any(is_slower(x, rows) for x in rows)


def test_a_broken_expression_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        build_parser().parse_args(["--only", "flux ("])
    assert refused.value.code == 2
    assert "'flux (', expected regular expressions" in capsys.readouterr().err


def test_what_counts_as_fine() -> None:
    fine = row(OURS, "ulysses2", 1)
    assert is_fine(fine, 0.01)
    fine.difference = 0.02
    assert not is_fine(fine, 0.01)
    stale = row(OURS, "pipefusion2", 1)
    stale.difference = 0.02
    assert is_fine(stale, 0.01)
    stale.error = "died"
    assert not is_fine(stale, 0.01)


def test_what_is_no_further_from_fp32_than_stock_counts_as_fine() -> None:
    stock = row(STOCK, "one", 1, compiled=True)
    eager = row(STOCK, "one", 1)
    ours = row(OURS, "ulysses2", 1, compiled=True)
    rows = [stock, eager, ours]
    ours.difference, stock.rounding, eager.rounding = 0.03, 0.02, 0.028
    assert not is_fine(ours, 0.01, rows)
    ours.rounding = 0.028
    assert is_fine(ours, 0.01, rows) and not is_fine(ours, 0.01)
    ours.rounding = 0.029
    assert not is_fine(ours, 0.01, rows)
    exact = row(STOCK, "one", 1)
    exact.layout, exact.rounding = Layout(STOCK, "one", exact_norms=True), 0.03
    assert not is_fine(ours, 0.01, [*rows, exact])
    eager.size = 2048
    ours.rounding = 0.028
    assert not is_fine(ours, 0.01, rows)
    # Where stock diffusers rounds little, it says nothing about what is off.
    ours.rounding, stock.rounding = 0.009, 0.009
    assert not is_fine(ours, 0.01, rows)


def test_difference_is_relative(tmp_path: Path) -> None:
    a, b = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save(torch.full((4,), 1.1), a)
    assert relative_difference(a, b) is None
    torch.save(torch.ones(4), b)
    assert relative_difference(a, b) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("name", list(MODELS))
def test_every_layout_uses_all_ranks(name: str) -> None:
    found = layouts_for(
        MODELS[name], 4, has_context_parallel=True, has_xfuser=True, on_gpu=True
    )
    assert found
    assert len({layout.name for layout in found}) == len(found)
    for layout in found:
        degrees = dict(layout.degrees)
        product = 2 if degrees.pop("use_cfg_parallel", False) else 1
        for degree in degrees.values():
            product *= degree
        assert product == layout.num_ranks == 4


def test_weights_follow_names() -> None:
    """Ranks that hold part of a model hold the same weights as one that holds all."""
    pipeline = build_pipeline(MODELS["sd3"], torch.device("cpu"), tiny=True)
    transformer = pipeline.transformer
    name, parameter = list(transformer.named_parameters())[-1]
    held = parameter.clone()
    for block in transformer.transformer_blocks[:2]:
        block.requires_grad_(False)
    del transformer.transformer_blocks
    draw_weights(transformer)
    assert torch.equal(dict(transformer.named_parameters())[name], held)
