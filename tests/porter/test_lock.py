"""The lock: proofs live as long as what they were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from porter import lock as module
from porter.errors import DriftError, PorterError
from porter.lock import Lock, read_lock
from porter.source import sha256
from porter.write import check_not_edited, write_all

ENTRY: dict[str, Any] = {"outputs": {"a.py": "1"}, "diffusers": "0.1", "proofs": None}


def proven() -> Lock:
    """A lock with one port and one proof."""
    return Lock({}).with_port("P", ENTRY).with_proofs("P", {"cfg": {"error": 1e-6}})


def test_a_proof_stays_while_its_key_holds() -> None:
    again = proven().with_port("P", ENTRY)
    assert again.ports["P"]["proofs"]["modes"] == {"cfg": {"error": 1e-6}}
    more = again.with_proofs("P", {"ring": {}})
    assert set(more.ports["P"]["proofs"]["modes"]) == {"cfg", "ring"}


def test_other_modes_of_a_proof_stay() -> None:
    lock = Lock({}).with_port("P", ENTRY).with_proofs("P", {"ring": {"ring2": {}}})
    more = lock.with_proofs("P", {"ring": {"ring4": {}}})
    assert set(more.ports["P"]["proofs"]["modes"]["ring"]) == {"ring2", "ring4"}


@pytest.mark.parametrize("change", [{"outputs": {"a.py": "2"}}, {"diffusers": "0.2"}])
def test_a_proof_goes_with_outputs_or_diffusers(change: dict[str, Any]) -> None:
    assert proven().with_port("P", {**ENTRY, **change}).ports["P"]["proofs"] is None


def test_a_proof_goes_with_the_runtimes_source(monkeypatch: pytest.MonkeyPatch) -> None:
    old = proven()
    monkeypatch.setattr(module, "runtime_sha256", lambda: "other")
    assert old.with_port("P", ENTRY).ports["P"]["proofs"] is None


def test_text_is_stable_and_read_back(tmp_path: Path) -> None:
    lock = Lock({"B": ENTRY, "A": ENTRY})
    assert lock.text() == Lock({"A": ENTRY, "B": ENTRY}).text()
    (tmp_path / "porter.lock").write_text(lock.text())
    assert read_lock(tmp_path).ports == lock.ports
    assert read_lock(tmp_path / "none").ports == {}


def test_facts_keep_their_order(tmp_path: Path) -> None:
    """The generated code follows it: facts that are read back give the same bytes."""
    facts = {"values": {"z": 1, "a": {"y": 2, "b": 3}}}
    lock = Lock({"P": {**ENTRY, "facts": facts}})
    (tmp_path / "porter.lock").write_text(lock.text())
    read = read_lock(tmp_path)
    assert json.dumps(read.ports["P"]["facts"]) == json.dumps(facts)
    assert read.text() == lock.text()


@pytest.mark.parametrize("text", ["", "[]", json.dumps({"version": 99, "ports": {}})])
def test_what_is_no_lock_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "porter.lock").write_text(text)
    with pytest.raises(PorterError, match="no lock"):
        read_lock(tmp_path)


def test_a_hand_edit_is_not_written_over(tmp_path: Path) -> None:
    write_all(tmp_path, {"a/b.py": "old"})
    known = {"a/b.py": sha256("old")}
    check_not_edited(tmp_path, {"a/b.py": "new"}, known)
    (tmp_path / "a/b.py").write_text("mine")
    with pytest.raises(DriftError, match="edited by hand"):
        check_not_edited(tmp_path, {"a/b.py": "new"}, known)


def test_an_error_while_writing_leaves_everything_as_it_was(tmp_path: Path) -> None:
    write_all(tmp_path, {"a.py": "old"})
    with pytest.raises(UnicodeEncodeError):
        write_all(tmp_path, {"a.py": "new", "b.py": "\ud800"})
    assert (tmp_path / "a.py").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.py"]


def test_equal_files_are_not_written(tmp_path: Path) -> None:
    assert write_all(tmp_path, {"a.py": "x"}) == ["a.py"]
    assert write_all(tmp_path, {"a.py": "x"}) == []
