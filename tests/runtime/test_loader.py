"""The loader imports what the lock records, and nothing else.

The ports here are one-line modules: what a port holds is not the loader's business.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from porter.lock import proof_key
from xfuser_runtime.args import xFuserArgs
from xfuser_runtime.errors import InputError, NotSupportedError
from xfuser_runtime.loader import load_pipeline_class, load_upstream_class

CFG = xFuserArgs(use_cfg_parallel=True).create_config(2)[0]
RING = xFuserArgs(ring_degree=2).create_config(2)[0]


def write_port(folder: Path, **changes: Any) -> Path:
    """A folder with the port of `toys:Toy`, `cfg` proven; `changes` go into its entry."""
    texts = {
        "pipelines/pipeline_toy.py": "class xFuserToy:\n    size = 1\n",
        "transformers/toy.py": "loaded = True\n",
    }
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    entry: dict[str, Any] = {
        "class": "toys:Toy",
        "diffusers": importlib.metadata.version("diffusers"),
        "generated": {"file": "pipelines/pipeline_toy.py", "class": "xFuserToy"},
        "outputs": {p: _sha256(t) for p, t in texts.items()},
        "override": None,
        "refused_modes": {},
    }
    entry["proofs"] = {"key": proof_key(entry), "modes": {"cfg": {}}}
    return write_lock(folder, {"toys:Toy": {**entry, **changes}})


def write_lock(folder: Path, ports: dict[str, Any]) -> Path:
    """The lock, in the format of version 1."""
    text = json.dumps({"version": 1, "ports": ports})
    (folder / "porter.lock").write_text(text)
    return folder


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("name", ["toys:Toy", "Toy"])
def test_a_port_is_found_by_name_or_class(name: str, tmp_path: Path) -> None:
    assert load_pipeline_class(name, generated=write_port(tmp_path)).size == 1


def test_the_same_files_give_the_same_class(tmp_path: Path) -> None:
    write_port(tmp_path)
    first = load_pipeline_class("Toy", generated=tmp_path)
    assert load_pipeline_class("Toy", generated=str(tmp_path)) is first


def test_proven_modes_pass_and_others_are_refused(tmp_path: Path) -> None:
    cls = load_pipeline_class("Toy", generated=write_port(tmp_path))
    cls.check_proven(CFG)
    with pytest.raises(NotSupportedError, match="toys:Toy: mode `ring` is not proven,"):
        cls.check_proven(RING)


@pytest.mark.parametrize("part", ["outputs", "diffusers", "runtime", "torch"])
def test_a_proof_of_anything_else_is_none(part: str, tmp_path: Path) -> None:
    write_port(tmp_path)
    (entry,) = json.loads((tmp_path / "porter.lock").read_text())["ports"].values()
    entry["proofs"]["key"][part] = "another"
    cls = load_pipeline_class("Toy", generated=write_lock(tmp_path, {"Toy": entry}))
    with pytest.raises(NotSupportedError, match=rf"\({part} changed since\)"):
        cls.check_proven(CFG)


def test_a_port_without_proofs_says_so(tmp_path: Path) -> None:
    cls = load_pipeline_class("Toy", generated=write_port(tmp_path, proofs=None))
    with pytest.raises(NotSupportedError, match="`cfg` is not proven, .* modes: none;"):
        cls.check_proven(CFG)


def test_a_subclass_takes_the_place_of_its_port(tmp_path: Path) -> None:
    folder = write_port(tmp_path)
    (entry,) = json.loads((folder / "porter.lock").read_text())["ports"].values()
    text = (
        "from xfuser_generated.pipelines.pipeline_toy import xFuserToy\n"
        "class Mine(xFuserToy):\n    size = xFuserToy.size + 1\n"
    )
    path = "overrides/xFuserToy.py"  # sorts before the file that it imports
    (folder / path).parent.mkdir()
    (folder / path).write_text(text)
    entry["override"] = {"file": path, "class": "Mine"}
    entry["outputs"][path] = _sha256(text)
    write_lock(folder, {"Toy": entry})
    assert load_pipeline_class("Toy", generated=folder).size == 2


def test_an_edited_file_is_refused_and_not_run(tmp_path: Path) -> None:
    file = write_port(tmp_path) / "transformers" / "toy.py"
    file.write_text("raise SystemExit('the edited file ran')\n")
    with pytest.raises(NotSupportedError, match="toy.py: edited since") as refused:
        load_pipeline_class("Toy", generated=tmp_path)
    assert "porter add-model toys:Toy" in str(refused.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    (write_port(tmp_path) / "transformers" / "toy.py").unlink()
    with pytest.raises(NotSupportedError, match=r"toy.py: no such file, .* add-model"):
        load_pipeline_class("Toy", generated=tmp_path)


def test_a_port_of_another_diffusers_is_refused(tmp_path: Path) -> None:
    write_port(tmp_path, diffusers="0.1.0")
    with pytest.raises(
        NotSupportedError, match=r"made from diffusers 0\.1\.0, expected"
    ):
        load_pipeline_class("Toy", generated=tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 2, "ports": {}}'])
def test_what_is_no_lock_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "porter.lock").write_text(text)
    with pytest.raises(InputError, match="no lock of version 1"):
        load_pipeline_class("Toy", generated=tmp_path)


def test_a_missing_port_and_a_missing_lock_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="porter.lock: no such file.* add-model Toy"):
        load_pipeline_class("Toy", generated=tmp_path)
    write_port(tmp_path)
    with pytest.raises(InputError, match="no port of Other, .* one of: toys:Toy;"):
        load_pipeline_class("Other", generated=tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("PixArtAlphaPipelin", "expected PixArtAlphaPipeline or"),
        ("no_such_module:Pipeline", "No module named 'no_such_module', expected"),
        ("json:Pipeline", "no class Pipeline in json, expected a pipeline"),
    ],
)
def test_an_unknown_upstream_class_is_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_upstream_class(name)
