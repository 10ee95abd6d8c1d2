from __future__ import annotations

import pytest

from porter.errors import PorterError
from porter.verify.modes import Mode, all_modes, parse_mode, parse_modes

REQUIRED = {
    *("dp2", "cfg2", "ulysses2", "ulysses4", "ring2", "ring4", "pp2", "pp2/1", "pp4"),
    *("ring2 x ulysses2", "cfg2 x ulysses2", "cfg2 x ring2", "cfg2 x pp2"),
    *("pp2 x ulysses2", "pp2 x ring2"),
    *("dp2 x cfg2", "dp2 x ulysses2", "dp2 x ring2", "dp2 x pp2"),
    *("pipefusion2/2", "pipefusion2/3", "pipefusion2/4"),
    *("cfg2 x pipefusion2/2", "cfg2 x pipefusion2/3"),
    *("pipefusion2/2 x ulysses2", "pipefusion2/3 x ulysses2"),
}


def test_every_mode_that_must_be_proven_is_there() -> None:
    names = [mode.name for mode in all_modes()]
    assert len(names) == len(set(names))
    assert set(names) >= REQUIRED


def test_names_read_back() -> None:
    for mode in all_modes():
        assert parse_mode(mode.name) == mode
        assert 2 <= mode.world_size <= 4
    assert parse_mode("ulysses2xcfg2") == Mode(cfg=2, ulysses=2)


def test_a_kind_names_all_its_modes() -> None:
    assert parse_modes(["ulysses"]) == (Mode(ulysses=2), Mode(ulysses=4))
    assert [m.patches for m in parse_modes(["pipefusion"])] == [2, 3, 4]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "cfg3",
        "warp2",
        "ulysses16",
        "cfg2 x pp8",
        "ulysses1",
        "pp2/3",
        "pipefusion2/1",
    ],
)
def test_unknown_modes_are_refused_with_the_list(name: str) -> None:
    with pytest.raises(PorterError, match="pipefusion2/2"):
        parse_mode(name)


def test_arguments_carry_the_warmup() -> None:
    whole = Mode(pp=2).arguments(8)
    assert (whole["warmup_steps"], whole["num_pipeline_patch"]) == (8, 1)
    patches = Mode(pp=2, patches=3).arguments(8)
    assert (patches["warmup_steps"], patches["num_pipeline_patch"]) == (1, 3)
