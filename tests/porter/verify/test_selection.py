"""Which modes are verified: those of a tier that the port has, or those that were named."""

from __future__ import annotations

from typing import Any

import pytest

from porter.coverage import MODES
from porter.errors import PorterError
from porter.lock import proof_key
from porter.verify.modes import CORE, all_modes, parse_modes
from porter.verify.selection import Selection, Tier

ENTRY: dict[str, Any] = {
    "outputs": {},
    "diffusers": "0",
    "refused_modes": {"pipefusion": "file.py:1: a construct"},
}


def _names(selection: Selection, entry: dict[str, Any] = ENTRY) -> list[str]:
    return [mode.name for mode in selection.of_port("Port", entry)]


def test_core_proves_every_column_of_the_coverage() -> None:
    proofs = {mode.proof for mode in CORE}
    assert proofs == {proof for column in MODES.values() for proof in column}


def test_a_tier_leaves_out_what_the_port_lacks() -> None:
    assert _names(Selection(tier=Tier.core)) == [
        mode.name for mode in CORE if "pipefusion" not in mode.kinds
    ]
    full = {mode for mode in all_modes() if "pipefusion" not in mode.kinds}
    assert len(_names(Selection())) == len(full)


def test_a_named_mode_that_the_port_lacks_is_refused() -> None:
    with pytest.raises(PorterError, match="a construct"):
        _names(Selection(parse_modes(["pipefusion2/2"])))


def test_fast_is_one_mode_and_no_proof() -> None:
    fast = Selection(tier=Tier.fast)
    assert _names(fast) == ["ulysses2"] and not fast.is_proof
    sharded = dict.fromkeys(("ulysses", "ring", "pp", "pipefusion"), "why")
    assert _names(fast, {**ENTRY, "refused_modes": sharded}) == ["cfg2"]


def test_calls_with_callbacks_are_for_the_full_tier_and_named_modes() -> None:
    assert Selection().cases is None
    assert Selection(parse_modes(["cfg2"]), Tier.core).cases is None
    core = Selection(tier=Tier.core).cases
    assert core and all(case.callback is None for case in core)
    assert {case.batch for case in core} == {1, 2}
    assert {case.guidance for case in core} == {True, False}


def test_missing_leaves_out_valid_proofs_alone() -> None:
    modes = {"cfg": {"cfg2": {}}, "ulysses": {"ulysses4": {}}}
    held = {**ENTRY, "proofs": {"key": proof_key(ENTRY), "modes": modes}}
    missing = Selection(parse_modes(["cfg2", "ulysses2"]), missing=True)
    assert _names(missing, held) == ["ulysses2"]
    held["proofs"]["key"] = {**held["proofs"]["key"], "torch": "0"}
    assert _names(missing, held) == ["cfg2", "ulysses2"]
