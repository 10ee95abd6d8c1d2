"""Every text-to-image pipeline of the installed diffusers: refused in one line, or a port
that imports and passes one mode.

`make scope` runs it; `porter add-model --all` and `porter verify --tier core` run everything.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from porter import verify
from porter.errors import InternalError
from porter.generate import Plan, plan_all
from porter.tasks import pipeline_tasks

pytestmark = [
    pytest.mark.skipif(
        "PORTER_SCOPE" not in os.environ,
        reason="about half an hour on two cores: make scope",
    ),
    # The first test ports all of them.
    pytest.mark.timeout(1200),
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


def test_most_are_ported_and_the_rest_is_refused_in_one_line(planned: Plan) -> None:
    assert len(planned.ports) >= 30
    assert len(planned.ports) + len(planned.failed) == len(NAMES)
    for name, error in planned.failed.items():
        assert not isinstance(error, InternalError), name
        assert "\n" not in str(error) and "expected" in str(error), name


@pytest.mark.parametrize("name", NAMES)
def test_a_port_passes_one_mode(name: str, planned: Plan, generated: Path) -> None:
    if name not in planned.ports:
        pytest.skip(f"refused: {planned.failed[name]}")
    assert verify.run([name], None, generated=generated, tier=verify.Tier.fast) == 0
