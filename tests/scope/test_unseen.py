"""A model that did not exist when porter was written: made up here, under random names."""

from __future__ import annotations

import random
import string
from pathlib import Path

import pytest

from porter.generate import plan
from porter.verify import parse_modes, verify_pipeline

SOURCE = Path(__file__).parent / "data" / "weft.py"


def test_an_unseen_model_is_ported_and_proven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    word = "".join(random.choices(string.ascii_lowercase, k=8))
    module, prefix = f"module_{word}", word.capitalize()
    text = SOURCE.read_text(encoding="utf-8").replace("Weft", prefix)
    (tmp_path / f"{module}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    name, generated = f"{module}:{prefix}Pipeline", tmp_path / "generated"
    plan([name], generated).write(generated)
    modes = parse_modes(
        ["cfg2", "ulysses2", "ring2", "pp2", "pipefusion2/2", "ring2 x ulysses2"]
    )
    found = verify_pipeline(name, generated=generated, modes=modes)
    assert found.exit_code == 0, found.table()
