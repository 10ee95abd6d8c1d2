"""The workshop: made once a session."""

from __future__ import annotations

import pytest

from tests.integration.workshop import Workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Ports in a folder of their own, and tiny stock pipelines."""
    return Workshop(tmp_path_factory.mktemp("workshop") / "generated")
