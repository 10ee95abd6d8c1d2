"""Facts of a few pipelines, measured once for all tests of the porter."""

from __future__ import annotations

import pytest

from porter import port, source
from porter.analysis.facts import PipelineFacts

_MEASURED = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")


@pytest.fixture(scope="session")
def measured() -> dict[str, PipelineFacts]:
    """Facts by class name."""
    return {name: port._measure(source.load(name)) for name in _MEASURED}


@pytest.fixture
def quick(
    measured: dict[str, PipelineFacts], monkeypatch: pytest.MonkeyPatch
) -> dict[str, PipelineFacts]:
    """Ports take the measured facts instead of running a model again."""
    monkeypatch.setattr(
        port, "_measure", lambda upstream: measured[upstream.class_name]
    )
    return measured
