from __future__ import annotations

import json
import math

import pytest

from porter.lock import Lock
from porter.verify.modes import Mode, all_modes
from porter.verify.proofs import with_verification
from porter.verify.sabotage import FAULTS, MIXING_FAULTS, Mechanisms, faults_for
from porter.verify.verdict import Measurement, ModeVerdict, Sabotage, Verification
from xfuser_runtime.replay.faults import FAULTS as INJECTED

ULYSSES = Mode(ulysses=2)
GOOD = Measurement("case", 1e-6, 1e-6)
BAD = Measurement("case", 1e-3, 1e-6)
CAUGHT = Sabotage("fault", 1e-1, 1e-6)
MISSED = Sabotage("fault", 1e-5, 1e-6)


def _verdict(mode: Mode = ULYSSES, **fields: object) -> ModeVerdict:
    given: dict[str, object] = {"measurements": (GOOD,), "sabotages": (CAUGHT,)}
    return ModeVerdict(mode, "stock", **{**given, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "status", "explanation"),
    [
        ({}, "proven", ""),
        ({"measurements": (GOOD, BAD)}, "failed", "error 1.0e-03 > gate 2.0e-05"),
        ({"sabotages": (CAUGHT, MISSED)}, "unproven", "not caught: error 1.0e-05"),
        ({"sabotages": ()}, "unproven", "no sabotage was run"),
        ({"failure": "rank 1: boom"}, "stopped", "rank 1: boom"),
        ({"measurements": ()}, "stopped", "no case"),
    ],
)
def test_a_mode_is_proven_by_small_errors_and_caught_sabotage(
    fields: dict[str, object], status: str, explanation: str
) -> None:
    verdict = _verdict(**fields)
    assert verdict.status == status
    assert explanation in verdict.explanation


def test_callbacks_must_be_those_of_stock() -> None:
    verdict = _verdict(measurements=(Measurement("case", 0.0, 1e-6, False),))
    assert (verdict.status, "callbacks" in verdict.explanation) == ("failed", True)


@pytest.mark.parametrize(
    "sabotage",
    [
        Sabotage("fault", math.nan, 1e-6, "the ranks stopped: boom"),
        Sabotage("fault", 1e-1, 1e-6, "the broken function was never called"),
    ],
)
def test_a_sabotage_that_did_not_run_shows_nothing(sabotage: Sabotage) -> None:
    assert _verdict(sabotages=(CAUGHT, sabotage)).status == "unproven"


EVERYTHING = Mechanisms(
    masks=True,
    mixing=tuple(MIXING_FAULTS),
    several_latents=True,
    helpers=True,
    shares="loop",
)


def test_table_and_json_say_the_same() -> None:
    verdicts = (_verdict(), _verdict(Mode(cfg=2), measurements=(BAD,)))
    verification = Verification("Pipe", verdicts, {"dull case": "too dull"}, 3.0)
    assert verification.exit_code == 1
    table = verification.table()
    for text in ("ulysses2", "cfg2: case: error", "dull case", "1 of 2 modes proven"):
        assert text in table
    data = json.loads(json.dumps(verification.to_json()))
    assert [mode["status"] for mode in data["modes"]] == ["proven", "failed"]
    assert data["exit_code"] == 1


def test_every_fault_that_is_asked_for_can_be_injected() -> None:
    asked = {fault for mode in all_modes() for fault in faults_for(mode, EVERYTHING)}
    assert asked == set(INJECTED)
    for mode in all_modes():
        for kind in mode.kinds:
            assert set(FAULTS[kind]) & set(faults_for(mode, Mechanisms()))


@pytest.mark.parametrize(
    ("shares", "faults"),
    [
        ("", {"stage_feedback_dropped"}),
        ("loop", {"stage_feedback_dropped", "shared_latents_dropped"}),
        ("steps", {"shared_latents_dropped"}),
    ],
)
def test_stages_are_broken_by_how_the_latents_come_back(
    shares: str, faults: set[str]
) -> None:
    has = Mechanisms.of({}, shares=shares)
    assert set(faults_for(Mode(pp=2), has)) == faults | {"stage_hand_over_dropped"}


def test_new_verdicts_replace_old_proofs() -> None:
    lock = Lock({"Pipe": {"outputs": {"a.py": "1"}, "diffusers": "0", "proofs": None}})

    def after(lock: Lock, *verdicts: ModeVerdict) -> Lock:
        return with_verification(lock, "Pipe", Verification("Pipe", verdicts, {}, 1.0))

    def proven(lock: Lock) -> set[str]:
        return set(lock.ports["Pipe"]["proofs"]["modes"])

    def refuted(lock: Lock) -> dict[str, dict[str, str]]:
        return dict(lock.ports["Pipe"]["proofs"]["refuted"])

    lock = after(lock, _verdict(), _verdict(Mode(cfg=2)))
    assert proven(lock) == {"ulysses", "cfg"}
    # Two modes stand for one name: both must pass.
    lock = after(lock, _verdict(), _verdict(Mode(ulysses=4), measurements=(BAD,)))
    assert proven(lock) == {"cfg"}
    assert list(refuted(lock)) == ["ulysses"]
    assert list(refuted(lock)["ulysses"]) == ["ulysses4"]
    lock = after(lock, _verdict(Mode(cfg=2, ulysses=2)))
    assert proven(lock) == {"cfg", "cfg x ulysses"}
    assert list(refuted(lock)) == ["ulysses"]
    # What was wrong stays so, whatever another mode of the name shows.
    again = after(lock, _verdict())
    assert "ulysses" not in proven(again) and refuted(again) == refuted(lock)
    again = after(again, _verdict(Mode(ulysses=4)))
    assert "ulysses" in proven(again) and refuted(again) == {}
