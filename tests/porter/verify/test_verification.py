"""Verification from end to end: a right port is proven, a sabotaged one is found out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from porter import verify
from porter.errors import PorterError
from porter.generate import plan
from porter.lock import read_lock
from porter.source import sha256
from porter.verify.cases import cases_for
from porter.verify.verification import _Subject

NAME = "PixArtAlphaPipeline"
TRANSFORMER = "transformers/pixart_transformer_2d.py"
GATHER = 'hidden_states = region.gather(hidden_states, 1, "hidden_states")'


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the port of one pipeline."""
    folder = tmp_path_factory.mktemp("generated")
    plan([NAME], folder).write(folder)
    return folder


def _chosen(modes: list[str], *, missing: bool = False) -> verify.Selection:
    return verify.Selection(verify.parse_modes(modes), missing=missing)


def _edit(folder: Path, path: str, change: Callable[[str], str]) -> None:
    """Change a generated file as if porter had written it so."""
    file = folder / path
    text = file.read_text()
    changed = change(text)
    assert changed != text
    file.write_text(changed)
    lock = folder / "porter.lock"
    lock.write_text(lock.read_text().replace(sha256(text), sha256(changed)))


def test_a_right_port_is_proven_and_the_lock_says_so(
    port: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(port, tmp_path / "generated")
    modes = ["cfg2", "ulysses2", "pipefusion2/3"]
    assert verify.run([NAME], _chosen(modes), generated=folder) == 0
    assert "3 of 3 modes proven" in capsys.readouterr().out
    proofs = read_lock(folder).ports[NAME]["proofs"]["modes"]
    assert set(proofs) == {"cfg", "ulysses", "pipefusion"}
    assert proofs["ulysses"]["ulysses2"]["error"] < 1e-4
    assert verify.run([NAME], _chosen(modes, missing=True), generated=folder) == 0
    assert "nothing is missing" in capsys.readouterr().err


def test_several_ports_in_processes(
    port: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(port, tmp_path / "generated")
    names = [NAME, "NoSuchPipeline"]
    assert verify.run(names, _chosen(["cfg2"]), generated=folder, processes=2) == 1
    told = capsys.readouterr()
    assert "1 of 1 modes proven" in told.out
    assert "error: NoSuchPipeline: no port NoSuchPipeline" in told.err
    assert set(read_lock(folder).ports[NAME]["proofs"]["modes"]) == {"cfg"}


def test_a_sabotaged_port_is_found_out(
    port: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(port, tmp_path / "generated")

    def drop_gather(text: str) -> str:
        zeros = (
            "hidden_states = region._whole_shape(hidden_states, 1, ('hidden_states',))"
        )
        assert GATHER in text
        return text.replace(GATHER, zeros)

    _edit(folder, TRANSFORMER, drop_gather)
    chosen = _chosen(["cfg2", "ring2"])
    assert verify.run([NAME], chosen, generated=folder, as_json=True) == 1
    (found,) = json.loads(capsys.readouterr().out)
    status = {mode["mode"]: mode["status"] for mode in found["modes"]}
    # Guidance on two ranks gathers nothing here: what is right stays proven.
    assert status == {"cfg2": "proven", "ring2": "failed"}
    assert set(read_lock(folder).ports[NAME]["proofs"]["modes"]) == {"cfg"}


def test_a_rank_that_raises_is_named(port: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(port, tmp_path / "generated")

    def fail(text: str) -> str:
        return text.replace(GATHER, "raise ArithmeticError('broken block loop')")

    _edit(folder, TRANSFORMER, fail)
    (mode,) = verify.parse_modes(["ulysses2"])
    found = verify.verify_pipeline(NAME, generated=folder, modes=[mode])
    (verdict,) = found.verdicts
    assert verdict.status == "stopped"
    assert "rank" in verdict.explanation and "broken block loop" in verdict.explanation


def test_a_port_edited_by_hand_is_not_run(port: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(port, tmp_path / "generated")
    with (folder / TRANSFORMER).open("a") as file:
        file.write("\n# by hand\n")
    with pytest.raises(PorterError, match="edited since porter wrote it"):
        verify.run([NAME], _chosen(["cfg2"]), generated=folder)


@pytest.mark.parametrize(
    ("names", "modes", "message"),
    [
        (["NoSuchPipeline"], ["cfg2"], "no port NoSuchPipeline"),
        ([NAME], ["cfg5"], "mode 'cfg5'"),
    ],
)
def test_bad_input_is_one_line(
    port: Path, names: list[str], modes: list[str], message: str
) -> None:
    with pytest.raises(PorterError, match=message) as caught:
        verify.run(names, _chosen(modes), generated=port)
    assert "\n" not in str(caught.value)


def test_a_model_too_dull_to_prove_anything_is_rejected(pixart: Any) -> None:
    weights = [
        parameter
        for name, parameter in pixart.transformer.named_parameters()
        if "to_out" in name
    ]
    before = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.zero_()
        with pytest.raises(PorterError, match="lost_keys moves it by"):
            _Subject(pixart, lambda _: None, cases_for(pixart))
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)


def test_proofs_of_what_has_changed_meanwhile_are_not_kept(
    port: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(port, tmp_path / "generated")

    def meanwhile(name: str, **_: Any) -> verify.Verification:
        _edit(folder, TRANSFORMER, lambda text: text + "# changed\n")
        return verify.Verification(name, (), {}, 0.0)

    monkeypatch.setattr(verify, "verify_pipeline", meanwhile)
    with pytest.raises(PorterError, match="changed while it was verified"):
        verify.run([NAME], _chosen(["cfg2"]), generated=folder)
    assert not read_lock(folder).ports[NAME]["proofs"]
