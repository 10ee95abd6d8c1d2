"""Modes are offered when each kind and each pair of kinds in them is proven."""

from __future__ import annotations

from pathlib import Path

import pytest

import xfuser_runtime
from xfuser_runtime.args import xFuserArgs
from xfuser_runtime.config import EngineConfig
from xfuser_runtime.errors import NotSupportedError
from xfuser_runtime.proofs import (
    Proofs,
    needed_proofs,
    runtime_sha256,
    source_sha256,
)

PAIRS = ("cfg x ulysses", "cfg x ring", "ring x ulysses")
PROVEN = frozenset({"dp", "cfg", "ring", "ulysses", "pp", *PAIRS})


def engine_config(**flags: object) -> EngineConfig:
    """The configuration of these flags, on as many ranks as they ask for."""
    args = xFuserArgs(**flags)  # type: ignore[arg-type]
    world_size = (
        args.data_parallel_degree
        * (2 if args.use_cfg_parallel else 1)
        * args.ulysses_degree
        * args.ring_degree
        * args.pipefusion_parallel_degree
    )
    return args.create_config(world_size)[0]


def test_one_process_needs_no_proof() -> None:
    assert list(needed_proofs(engine_config())) == []
    Proofs("P", frozenset()).check_proven(engine_config())


@pytest.mark.parametrize(
    ("flags", "needed"),
    [
        ({"use_cfg_parallel": True}, ["cfg"]),
        ({"ulysses_degree": 8}, ["ulysses"]),
        (
            {"use_cfg_parallel": True, "ulysses_degree": 2, "ring_degree": 2},
            ["cfg", "ring", "ulysses", "cfg x ring", "cfg x ulysses", "ring x ulysses"],
        ),
        ({"pipefusion_parallel_degree": 2}, ["pipefusion"]),
        ({"pipefusion_parallel_degree": 2, "num_pipeline_patch": 1}, ["pp"]),
        (
            {"data_parallel_degree": 2, "pipefusion_parallel_degree": 2},
            ["dp", "pipefusion", "dp x pipefusion"],
        ),
    ],
)
def test_kinds_and_pairs_of_a_configuration(
    flags: dict[str, object], needed: list[str]
) -> None:
    assert list(needed_proofs(engine_config(**flags))) == needed


def test_a_product_of_three_is_offered_when_its_pairs_are_proven() -> None:
    config = engine_config(use_cfg_parallel=True, ulysses_degree=2, ring_degree=2)
    Proofs("P", PROVEN).check_proven(config)
    for pair in PAIRS:
        with pytest.raises(NotSupportedError, match=f"mode `{pair}` is not proven"):
            Proofs("P", PROVEN - {pair}).check_proven(config)


def test_an_unproven_mode_is_refused_by_name_and_says_what_works() -> None:
    with pytest.raises(NotSupportedError) as refused:
        Proofs("P", frozenset({"cfg", "dp"})).check_proven(engine_config(ring_degree=2))
    message = str(refused.value)
    assert "\n" not in message
    assert "P: mode `ring` is not proven" in message
    assert "proven modes: cfg, dp;" in message
    assert "porter verify P" in message and "--allow_unproven" in message


def test_a_stale_proof_is_none_and_says_why() -> None:
    proofs = Proofs("P", PROVEN, stale="the runtime changed")
    with pytest.raises(
        NotSupportedError, match=r"`cfg` is not proven \(the runtime ch"
    ):
        proofs.check_proven(engine_config(use_cfg_parallel=True))


def test_a_mode_that_the_port_lacks_is_refused_whatever_is_allowed() -> None:
    proofs = Proofs("P", PROVEN, refused={"pipefusion": "pipeline_p.py:12: a momentum"})
    config = engine_config(pipefusion_parallel_degree=2, allow_unproven=True)
    with pytest.raises(NotSupportedError, match="`pipefusion` was refused .*py:12"):
        proofs.check_proven(config)
    proofs.check_proven(engine_config(ulysses_degree=2))


def test_allow_unproven_warns_on_every_run() -> None:
    config = engine_config(ring_degree=2, allow_unproven=True)
    for _ in range(2):
        with pytest.warns(UserWarning, match="mode `ring` is not proven"):
            Proofs("P", frozenset()).check_proven(config)


@pytest.mark.parametrize(
    ("path", "counts"),
    [
        ("attention/ring.py", True),
        ("loader.py", True),
        ("run.py", False),
        ("proofs.py", False),
        ("replay/faults.py", False),
        ("cuda/symmetric.py", False),
    ],
)
def test_proofs_depend_on_the_source_that_computes(
    path: str, counts: bool, tmp_path: Path
) -> None:
    source = tmp_path / path
    source.parent.mkdir(exist_ok=True)
    source.write_text("one")
    before = source_sha256(tmp_path)
    source.write_text("two")
    assert (source_sha256(tmp_path) != before) is counts


def test_the_runtimes_hash_is_of_its_own_source() -> None:
    assert runtime_sha256() == source_sha256(Path(xfuser_runtime.__file__).parent)
