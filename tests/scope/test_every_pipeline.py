"""Every pipeline of the installed diffusers: refused in one line, or a port that imports.

The text-to-image ports also run in one mode that the repository's lock calls proven, so that
a proof is seen to hold.  `make scope` runs it; `make coverage` proves everything.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from porter.errors import InternalError
from porter.generate import Plan, plan_all
from porter.lock import read_lock
from porter.source import pipeline_classes
from porter.tasks import pipeline_tasks
from porter.verify.cases import SABOTAGED
from porter.verify.modes import TELLING, Mode
from porter.verify.verification import verify_pipeline
from porter.workers import Outcome, in_processes
from xfuser_runtime.loader import load_pipeline_class

pytestmark = [
    pytest.mark.skipif(
        "PORTER_SCOPE" not in os.environ, reason="minutes on two cores: make scope"
    ),
    # The first test ports all of them, a later one runs some.
    pytest.mark.timeout(1800),
    # Upstream's code warns.
    pytest.mark.filterwarnings("default"),
]

COMMITTED = Path(__file__).parents[2] / "generated"
NAMES = pipeline_classes()
OF_TASK = sorted(n for n, task in pipeline_tasks().items() if task == "text-to-image")


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the ports."""
    return tmp_path_factory.mktemp("scope") / "generated"


@pytest.fixture(scope="module")
def planned(generated: Path) -> Plan:
    """All of them, ported or refused."""
    made = plan_all(NAMES, generated)
    made.write(generated)
    return made


@pytest.fixture(scope="module")
def imported(planned: Plan, generated: Path) -> dict[str, Outcome[str]]:
    """The name of the class that each port imports."""

    def load(name: str) -> str:
        return str(load_pipeline_class(name, generated).__name__)

    outcomes = in_processes(load, list(planned.ports), processes=2, timeout=120.0)
    return {outcome.name: outcome for outcome in outcomes}


@pytest.fixture(scope="module")
def verified(planned: Plan, generated: Path) -> dict[str, Outcome[str]]:
    """What the ports say to one mode: "proven", or why not."""

    def verify(name: str) -> str:
        found = verify_pipeline(
            name, generated=generated, modes=(proven_mode(name),), cases=(SABOTAGED,)
        )
        return "; ".join(v.explanation or v.status for v in found.verdicts)

    names = [name for name in OF_TASK if name in planned.ports]
    outcomes = in_processes(verify, names, processes=2, timeout=300.0)
    return {outcome.name: outcome for outcome in outcomes}


def proven_mode(name: str) -> Mode:
    """The most telling mode that the repository's lock says is proven."""
    proofs = read_lock(COMMITTED).ports[name]["proofs"]["modes"]
    return next(mode for mode in TELLING if mode.proof in proofs)


def test_most_are_ported_and_the_rest_is_refused_in_one_line(planned: Plan) -> None:
    assert len(planned.ports) >= 140, list(planned.failed)
    assert len(planned.ports) + len(planned.failed) == len(NAMES)
    for name, error in planned.failed.items():
        assert not isinstance(error, InternalError), name
        assert "\n" not in str(error) and "expected" in str(error), name


def test_ports_import(planned: Plan, imported: dict[str, Outcome[str]]) -> None:
    assert imported.keys() == planned.ports.keys()
    wrong = {n: o.result for n, o in imported.items() if o.result != f"xFuser{n}"}
    assert wrong == {}


@pytest.mark.parametrize("name", OF_TASK)
def test_a_port_passes_one_mode(
    name: str, planned: Plan, verified: dict[str, Outcome[str]]
) -> None:
    if name not in planned.ports:
        pytest.skip(f"refused: {planned.failed[name]}")
    assert verified[name].result == "proven"
