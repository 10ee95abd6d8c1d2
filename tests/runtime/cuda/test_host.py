"""Numbers between host and device: what is noted, what follows from what, and what is refused.

The device is the CPU where numbers are read, the meta device where they are sent.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from xfuser_runtime.cuda.arguments import NotReplayable
from xfuser_runtime.cuda.host import HostPlayer, HostRecorder
from xfuser_runtime.cuda.notes import HostNotes
from xfuser_runtime.cuda.waits import WAIT

MASK = torch.tensor([True, False, True, True])
ROWS = torch.arange(12.0).view(4, 3)

#: Functions of a mask and rows that wait for the mask, and how often.
READS: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], Any], int]] = {
    "number": (lambda mask, rows: rows[: int(mask.sum())], 1),
    "branch": (lambda mask, rows: rows if mask.all() else -rows, 1),
    "mask": (lambda mask, rows: rows[mask], 1),
    "mask of columns": (lambda mask, rows: rows.T[:, mask], 1),
    "write": (lambda mask, rows: rows.clone().index_put_((mask,), ROWS[0, 0]), 1),
    "write and read": (lambda mask, rows: _doubled(mask, rows), 2),
    "places": (lambda mask, rows: rows[mask.nonzero(as_tuple=True)[0] - 1], 1),
    "repeats": (lambda mask, rows: rows.repeat_interleave(mask.long() + 1, dim=0), 1),
    "equal": (lambda mask, rows: rows if torch.equal(mask, mask) else -rows, 1),
    "derived": (lambda mask, rows: rows[: int((~mask).cumsum(0).view(2, 2)[1, 1])], 1),
    "through memory": (lambda mask, rows: rows[: int(_filled(mask).sum())], 1),
}


def _doubled(mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    rows = rows.clone()
    rows[mask] *= 2
    return rows


def _filled(mask: torch.Tensor) -> torch.Tensor:
    filled = torch.zeros(2, 4, dtype=torch.long)
    filled[1] = mask
    return filled


def noted(function: Callable[..., Any], *arguments: torch.Tensor) -> HostNotes:
    with HostRecorder(arguments, "cpu") as recorder:
        found = function(*arguments)
    assert torch.equal(found, function(*arguments))
    return recorder.notes


@pytest.mark.parametrize("name", READS)
def test_reads_are_noted_with_the_argument_that_they_follow_from(name: str) -> None:
    function, count = READS[name]
    notes = noted(function, MASK, ROWS)
    assert notes.reason is None and len(notes.entries) == count
    assert list(notes.fixed) == [0] and torch.equal(notes.fixed[0], MASK)


@pytest.mark.parametrize("name", READS)
def test_reads_are_answered_from_the_notes(name: str) -> None:
    function, _ = READS[name]
    notes, other = noted(function, MASK, ROWS), ROWS + 1
    # Another mask, whose numbers nobody may look at.
    with HostPlayer(notes, "cpu"):
        found = function(~MASK, other)
    assert torch.equal(found, function(MASK, other))


def test_notes_hold_for_equal_arguments() -> None:
    mask = MASK.clone()
    notes = noted(READS["mask"][0], mask, ROWS)
    assert notes.hold([mask, ROWS * 2]) and notes.hold([mask.clone(), ROWS])
    assert not notes.hold([~mask, ROWS])
    assert notes.hold([mask, ROWS])
    mask[0] = False
    assert not notes.hold([mask, ROWS])


def test_notes_hold_for_tensors_that_count_no_changes() -> None:
    notes = noted(READS["mask"][0], MASK, ROWS)
    with torch.inference_mode():
        mask = MASK.clone()
        assert notes.hold([mask, ROWS])
        mask[0] = False
        assert not notes.hold([mask, ROWS])


WEIGHT = torch.tensor(2.0)
BUFFER = torch.empty(4, dtype=torch.long)


def _through_a_buffer(mask: torch.Tensor) -> torch.Tensor:
    BUFFER.copy_(mask)
    return BUFFER


@pytest.mark.parametrize(
    "number",
    [
        lambda mask, rows: WEIGHT,
        lambda mask, rows: mask.sum() + WEIGHT,
        lambda mask, rows: torch.rand(()) * 4,
        lambda mask, rows: torch.empty(4).copy_(mask).sum(),
        lambda mask, rows: _through_a_buffer(mask).sum(),
        lambda mask, rows: rows.clone().sum() + rows.mul_(1).sum(),
        lambda mask, rows: torch.compile(lambda x: x.sum() + 1)(mask),
    ],
    ids=[
        "weight",
        "sum with a weight",
        "random",
        "unfilled",
        "buffer",
        "argument",
        "compiled",
    ],
)
def test_reads_of_what_may_change_are_refused(number: Callable[..., Any]) -> None:
    torch.compiler.reset()
    with HostRecorder([MASK, ROWS], "cpu") as recorder:
        int(number(MASK, ROWS))
    assert recorder.notes.reason is not None
    assert "do not follow from the arguments alone" in recorder.notes.reason
    assert "tests/runtime/cuda/test_host.py:" in recorder.notes.reason


class TestSent:
    """Numbers of the host that go to the device."""

    def notes(self, function: Callable[[], Any]) -> HostNotes:
        with HostRecorder([], "meta") as recorder:
            function()
        return recorder.notes

    @pytest.mark.parametrize(
        "function",
        [
            lambda: torch.arange(4).to("meta"),
            lambda: torch.zeros(4, device="meta").copy_(torch.arange(4)),
            lambda: torch.zeros(4, device="meta")[torch.tensor([1, 2])],
        ],
        ids=["to", "copy", "index"],
    )
    def test_are_noted_and_sent_no_more(self, function: Callable[[], Any]) -> None:
        notes = self.notes(function)
        assert notes.reason is None and len(notes.entries) == 1
        with HostPlayer(notes, "meta"):
            assert function().device.type == "meta"

    def test_once_for_all_blocks(self) -> None:
        table = torch.arange(4)
        notes = self.notes(lambda: [table.to("meta") for _ in range(3)])
        assert len(notes.entries) == 3 and len({id(x) for x in notes.entries}) == 1

        def changing() -> None:
            for _ in range(3):
                table.add_(1).to("meta")

        assert len({id(x) for x in self.notes(changing).entries}) == 3

    def test_notes_hold_until_the_host_writes_to_its_numbers(self) -> None:
        table = torch.arange(4)
        notes = self.notes(lambda: table[:2].to("meta"))
        assert notes.hold([])
        table += 1
        assert not notes.hold([])

    def test_other_numbers_are_refused(self) -> None:
        notes = self.notes(lambda: torch.arange(4).to("meta"))
        refusal = pytest.raises(NotReplayable, match="sends other numbers")
        with refusal, HostPlayer(notes, "meta"):
            torch.arange(1, 5).to("meta")

    def test_random_numbers_are_refused(self) -> None:
        notes = self.notes(lambda: torch.randn(4).mul(2).to("meta"))
        assert notes.reason is not None and "not the same" in notes.reason

    @pytest.mark.parametrize(
        "function",
        [
            lambda time: time.to("meta"),
            lambda time: (time * 2 + 1).to("meta"),
            lambda time: torch.ones(4, device="meta") * time,
        ],
        ids=["sent", "derived", "number"],
    )
    def test_arguments_on_the_host_must_stay_the_same(
        self, function: Callable[[torch.Tensor], Any]
    ) -> None:
        time = torch.tensor(3.0)
        with HostRecorder([ROWS, time], "meta") as recorder:
            function(time)
        assert recorder.notes.reason is None
        assert recorder.notes.fixed == {1: time}

    def test_random_numbers_for_a_kernel_are_refused(self) -> None:
        notes = self.notes(lambda: torch.ones(4, device="meta") * torch.rand(()))
        assert notes.reason is not None and "not the same" in notes.reason

    def test_more_than_was_noted_is_refused(self) -> None:
        with pytest.raises(NotReplayable), HostPlayer(HostNotes(), "meta"):
            torch.arange(4).to("meta")
        with pytest.raises(NotReplayable), HostPlayer(HostNotes(), "cpu"):
            MASK.nonzero()


class TestWaits:
    """As on CUDA, where torch warns of operations that the host waits for."""

    @pytest.fixture(autouse=True)
    def modes(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        modes: list[Any] = ["before"]
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
        return modes

    @pytest.mark.parametrize("is_last", [False, True])
    def test_what_nobody_answers_for_is_refused(
        self, modes: list[Any], is_last: bool
    ) -> None:
        with HostRecorder([MASK], "cuda") as recorder:
            torch.ones(2)
            assert recorder.notes.reason is None
            warnings.warn(WAIT, stacklevel=1)
            if not is_last:
                torch.ones(2)
                assert recorder.notes.reason is not None
        assert recorder.notes.reason is not None
        assert "the host waits for the device" in recorder.notes.reason
        assert "test_host.py:" in recorder.notes.reason
        assert modes == ["before", "warn", "before"]

    def test_other_warnings_are_heard(self) -> None:
        heard = pytest.warns(DeprecationWarning, match="soon")
        with heard, HostRecorder([MASK], "cuda") as recorder:
            warnings.warn("soon", DeprecationWarning, stacklevel=1)
            warnings.warn("Synchronization debug mode is new", stacklevel=1)
            torch.ones(2)
        assert recorder.notes.reason is None

    def test_answered_ones_are_not_warned_of(self, modes: list[Any]) -> None:
        with HostRecorder([MASK], "cuda") as recorder:
            recorder._awaited(torch.ones, (2,), {})
        assert modes == ["before", "warn", "default", "warn", "before"]


def test_compiled_code_runs_under_both() -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda x: torch.relu(x @ x) + 1, fullgraph=True)
    x = torch.randn(4, 4)
    expected = compiled(x)
    with HostRecorder([x], "cpu") as recorder:
        assert torch.equal(compiled(x), expected)
    with HostPlayer(recorder.notes, "cpu"):
        assert torch.equal(compiled(x), expected)
