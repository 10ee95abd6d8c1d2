"""Ports in processes: what fails in one, in whatever way, fails for one class alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from porter import port, workers
from porter.analysis.facts import PipelineFacts
from porter.cli import app
from porter.errors import InternalError, PorterError, Refusal
from porter.generate import plan, plan_all
from porter.lock import read_lock
from porter.port import Port
from porter.workers import port_all

ALPHA, SIGMA = "PixArtAlphaPipeline", "PixArtSigmaPipeline"


def _raise(name: str) -> Port:
    raise KeyError(f"{name}\nin two lines")


def _refuse(name: str) -> Port:
    raise Refusal(
        "a construct", expected="another", todo="do so", where="upstream.py:7"
    )


def _die(name: str) -> Port:
    os._exit(7)


def _hang(name: str) -> Port:
    time.sleep(600)
    raise AssertionError


FAULTS = {"Raises": _raise, "Refuses": _refuse, "Dies": _die}


@pytest.fixture
def faulty(
    quick: dict[str, PipelineFacts], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Names that fail each in its way among two that do not; forks inherit the patch."""
    names = [*FAULTS, ALPHA, SIGMA]

    def make(name: str) -> Port:
        return FAULTS.get(name, port.make_port)(name)

    monkeypatch.setattr(workers, "make_port", make)
    monkeypatch.setattr("porter.source.pipeline_classes", lambda: sorted(names))
    return names


def test_every_class_gets_its_own_answer(faulty: list[str]) -> None:
    found = {o.name: o.result for o in port_all(faulty)}
    assert found.keys() == set(faulty)
    assert isinstance(found[ALPHA], Port) and isinstance(found[SIGMA], Port)
    refused = found["Refuses"]
    assert type(refused) is Refusal
    assert str(refused) == "upstream.py:7: a construct, expected another; do so"
    raised = found["Raises"]
    assert isinstance(raised, InternalError)
    assert "KeyError" in raised.found and "\n" not in str(raised)
    assert "_raise" in raised.trace
    assert "exit code 7" in str(found["Dies"])
    assert not multiprocessing.active_children()


def test_one_that_hangs_is_ended(
    faulty: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAULTS, "Hangs", _hang)
    names = ["Hangs", "Refuses", "Raises"]
    found = {o.name: o.result for o in port_all(names, timeout=3.0)}
    assert "no answer for" in str(found["Hangs"])
    assert type(found["Refuses"]) is Refusal
    assert not multiprocessing.active_children()


def test_one_process_for_many_classes(faulty: list[str]) -> None:
    names = ["Dies", "Refuses", "Dies", "Raises"]
    found = [o.name for o in port_all(names, processes=1)]
    assert found == names


def test_what_comes_back_makes_the_same_files(
    quick: dict[str, PipelineFacts], tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    plan([ALPHA, SIGMA], here).write(here)
    plan_all([ALPHA, SIGMA], there).write(there)
    files = [p.relative_to(here) for p in sorted(here.rglob("*.*")) if p.is_file()]
    assert len(files) == 5
    for file in files:
        assert (here / file).read_bytes() == (there / file).read_bytes()


def test_all_writes_what_ports_and_names_the_rest(
    faulty: list[str], tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, ["add-model", "--all", "--output", str(tmp_path)])
    assert result.exit_code == 2
    rows = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert "  ported  " in rows[ALPHA] and "lines changed: pipeline" in rows[ALPHA]
    assert "  refused  " in rows["Refuses"] and "upstream.py:7" in rows["Refuses"]
    for name in ("Raises", "Dies"):
        assert "  internal error  " in rows[name]
    assert result.stdout.splitlines()[-1] == "2 internal error, 2 ported, 1 refused"
    lock = read_lock(tmp_path)
    assert set(lock.ports) == {ALPHA, SIGMA}
    # A fault of porter's own says nothing about the class.
    assert set(lock.refused) == {"Refuses"}
    assert not list(tmp_path.glob(".porter-*"))


@pytest.mark.parametrize(
    ("names", "code"), [([ALPHA], 0), (["Refuses", ALPHA], 1), (["Dies", ALPHA], 2)]
)
def test_exit_codes(
    faulty: list[str],
    names: list[str],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("porter.source.pipeline_classes", lambda: names)
    args = ["add-model", "--all", "--json", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == code
    data = json.loads(result.stdout)
    assert data[ALPHA]["status"] == "ported"
    if code:
        state = {1: "refused", 2: "internal error"}[code]
        assert data[names[0]]["status"] == state


def test_a_refused_port_goes_with_its_files(
    faulty: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_all([ALPHA, SIGMA], tmp_path).write(tmp_path)
    own = tmp_path / "pipelines" / "pipeline_pixart_sigma.py"
    shared = tmp_path / "transformers" / "pixart_transformer_2d.py"
    assert own.is_file() and shared.is_file()
    monkeypatch.setitem(FAULTS, SIGMA, _refuse)
    made = plan_all([ALPHA, SIGMA], tmp_path)
    made.write(tmp_path)
    assert not own.exists() and shared.is_file()
    assert set(read_lock(tmp_path).ports) == {ALPHA}
    assert set(read_lock(tmp_path).refused) == {SIGMA}
    monkeypatch.delitem(FAULTS, SIGMA)
    plan_all([ALPHA, SIGMA], tmp_path).write(tmp_path)
    assert own.is_file() and not read_lock(tmp_path).refused


def test_all_beside_a_name_is_an_error(faulty: list[str]) -> None:
    result = CliRunner().invoke(app, ["add-model", ALPHA, "--all"])
    assert result.exit_code == 2 and "--all beside" in result.stderr


def test_upstream_faults_are_refusals_and_ours_are_not() -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    from porter.probe.stock import upstream_runs
    from porter.shrink import kwargs

    place = "diffusers/models/embeddings.py:[0-9]+: the tiny copy of int"
    with pytest.raises(Refusal, match=place), upstream_runs(int):
        get_timestep_embedding(None, 4)
    with pytest.raises(AttributeError), upstream_runs(int):
        kwargs.image_sizes(None)
    with pytest.raises(PorterError, match="^as it was$"), upstream_runs(int):
        raise PorterError("as it was")


def test_a_class_that_calls_itself_wrongly_waits_for_upstream() -> None:
    from porter.probe import stock

    error = TypeError("Toy.encode() got an unexpected keyword argument 'index'")
    toy = type("Toy", (), {})
    assert stock._is_broken(toy, error)
    assert not stock._is_broken(
        toy, TypeError("run() got an unexpected keyword argument")
    )
    assert not stock._is_broken(toy, ValueError(str(error)))
