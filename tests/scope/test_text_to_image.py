"""Every text-to-image pipeline of the installed diffusers: refused in one line, or a port
that imports and passes one mode.

`make scope` runs it; `make coverage` ports and proves everything.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from porter.errors import InternalError
from porter.generate import Plan, plan_all
from porter.lock import read_lock
from porter.tasks import pipeline_tasks
from porter.verify import Selection, Tier
from porter.verify.verification import verify_pipeline
from porter.workers import Outcome, in_processes

pytestmark = [
    pytest.mark.skipif(
        "PORTER_SCOPE" not in os.environ, reason="minutes on two cores: make scope"
    ),
    # The first test ports all of them, the second one runs them.
    pytest.mark.timeout(1800),
]

TASK = "text-to-image"
NAMES = sorted(name for name, task in pipeline_tasks().items() if task == TASK)


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
def verified(planned: Plan, generated: Path) -> dict[str, Outcome[str]]:
    """What the ports say to one mode: "proven", or why not."""
    entries = read_lock(generated).ports

    def verify(name: str) -> str:
        fast = Selection(tier=Tier.fast)
        modes = fast.of_port(name, entries[name])
        found = verify_pipeline(
            name, generated=generated, modes=modes, cases=fast.cases
        )
        return "; ".join(v.explanation or v.status for v in found.verdicts)

    outcomes = in_processes(verify, list(planned.ports), processes=2, timeout=300.0)
    return {outcome.name: outcome for outcome in outcomes}


def test_most_are_ported_and_the_rest_is_refused_in_one_line(planned: Plan) -> None:
    assert len(planned.ports) >= 30
    assert len(planned.ports) + len(planned.failed) == len(NAMES)
    for name, error in planned.failed.items():
        assert not isinstance(error, InternalError), name
        assert "\n" not in str(error) and "expected" in str(error), name


@pytest.mark.parametrize("name", NAMES)
def test_a_port_passes_one_mode(
    name: str, planned: Plan, verified: dict[str, Outcome[str]]
) -> None:
    if name not in planned.ports:
        pytest.skip(f"refused: {planned.failed[name]}")
    assert verified[name].result == "proven"
