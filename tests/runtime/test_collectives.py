"""Collectives with uneven and empty shares, against what one process computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from xfuser_runtime.config import ParallelConfig
from xfuser_runtime.distributed import (
    Group,
    get_pp_group,
    get_sp_group,
    get_ulysses_group,
)
from xfuser_runtime.distributed.collectives import (
    P2PChannel,
    all_gather,
    all_reduce_max,
    all_to_all,
    all_to_all_flat,
    broadcast,
    broadcast_object,
)
from xfuser_runtime.distributed.parallel_state import initialize_model_parallel


def _whole(lengths: tuple[int, ...], dim: int, batch: int) -> torch.Tensor:
    shape = [batch, 2, 3]
    shape[dim] = sum(lengths)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
@pytest.mark.parametrize(
    "lengths", [(2, 2, 2), (3, 1, 2), (0, 4, 0), (1, 0, 0), (0, 0, 0)]
)
def test_all_gather(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    def gather(rank: int) -> list[bool]:
        initialize_model_parallel(ParallelConfig(ulysses_degree=3))
        good = []
        for dim in (0, 1, 2, -1):
            for batch in (1, 2):
                whole = _whole(lengths, dim, batch).to(dtype)
                own = whole.split(lengths, dim)[rank]
                gathered = all_gather(own, dim, lengths, get_ulysses_group())
                good.append(torch.equal(gathered, whole))
        return good

    assert run_ranks(gather, 3) == [[True] * 8] * 3


def test_all_gather_takes_rows_that_are_not_contiguous() -> None:
    def gather(rank: int) -> bool:
        initialize_model_parallel(ParallelConfig(ring_degree=2))
        whole = torch.arange(24.0).view(4, 6).t()
        own = whole[3 * rank : 3 * rank + 3]
        return torch.equal(all_gather(own, 0, (3, 3), get_sp_group()), whole)

    assert run_ranks(gather, 2) == [True, True]


def test_all_gather_stays_within_its_group() -> None:
    def gather(rank: int) -> list[float]:
        initialize_model_parallel(ParallelConfig(ring_degree=2, ulysses_degree=2))
        own = torch.full((1,), float(rank))
        return all_gather(own, 0, (1, 1), get_ulysses_group()).tolist()

    assert run_ranks(gather, 4) == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lengths \(3,\) for 1 ranks and 2 rows"):
        all_gather(torch.zeros(2), 0, (3,), Group())
    with pytest.raises(ValueError, match="expected one length a rank"):
        all_gather(torch.zeros(2), 0, (2, 2), Group())
    with pytest.raises(
        ValueError, match="pieces for 2 and shapes from 1 ranks, expected 1"
    ):
        all_to_all([[], []], [[]], Group())


def test_a_group_of_one_communicates_with_nobody() -> None:
    x = torch.arange(4.0)
    assert all_gather(x, 0, (4,), Group()) is x
    assert all_to_all_flat(x, [4], [4], Group()) is x
    assert torch.equal(
        all_to_all([[x, x]], [[(2, 2), (4,)]], Group())[0][0], x.view(2, 2)
    )
    assert broadcast_object("x", Group()) == "x"
    assert broadcast(x, Group()) is x
    assert torch.equal(all_reduce_max(x, Group()), x)


def test_all_to_all_of_several_shapes() -> None:
    """Rank s sends rank r the values 100 s + 10 r + piece, of shapes that both differ."""

    def shape(sender: int, receiver: int, piece: int) -> tuple[int, ...]:
        return (sender, 2) if piece == 0 else (1, receiver)

    def exchange(rank: int) -> bool:
        initialize_model_parallel(ParallelConfig(ulysses_degree=3))
        pieces = [
            [torch.full(shape(rank, to, p), 100.0 * rank + 10 * to + p) for p in (0, 1)]
            for to in range(3)
        ]
        shapes = [[shape(sender, rank, p) for p in (0, 1)] for sender in range(3)]
        received = all_to_all(pieces, shapes, get_ulysses_group())
        return all(
            torch.equal(
                received[sender][p],
                torch.full(shape(sender, rank, p), 100.0 * sender + 10 * rank + p),
            )
            for sender in range(3)
            for p in (0, 1)
        )

    assert run_ranks(exchange, 3) == [True] * 3


def test_traced_without_a_graph_break() -> None:
    def compiled(rank: int) -> bool:
        initialize_model_parallel(ParallelConfig(ulysses_degree=2))

        def step(x: torch.Tensor) -> torch.Tensor:
            group = get_ulysses_group()
            whole = all_gather(x * 2, 1, (1, 2), group)
            rows = 1 + group.rank_in_group
            pieces = all_to_all(
                [[whole[:, :1]], [whole[:, 1:]]], [[(2, rows, 3)]] * 2, group
            )
            return torch.cat([piece for (piece,) in pieces])

        x = torch.arange(6.0 * (rank + 1)).view(2, rank + 1, 3)
        traced = torch.compile(step, fullgraph=True, backend="aot_eager")
        return torch.equal(step(x), traced(x))

    assert run_ranks(compiled, 2) == [True, True]


def test_broadcasts_and_maximum() -> None:
    def share(rank: int) -> tuple[object, float, float, float]:
        initialize_model_parallel(ParallelConfig(data_parallel_degree=2, ring_degree=2))
        group = get_sp_group()
        value = broadcast_object({"rank": rank}, group, 1)
        x = broadcast(torch.tensor(float(rank)), group, 1)
        own = torch.tensor(float(rank))
        return value, x.item(), all_reduce_max(own, group).item(), own.item()

    assert run_ranks(share, 4) == [
        ({"rank": 1}, 1, 1, 0),
        ({"rank": 1}, 1, 1, 1),
        ({"rank": 3}, 3, 3, 2),
        ({"rank": 3}, 3, 3, 3),
    ]


def test_channel_keeps_the_order_and_the_tensors() -> None:
    """Forward and feedback run at once, and no sender keeps a tensor of its own."""

    def pass_on(rank: int) -> list[float]:
        initialize_model_parallel(ParallelConfig(pipefusion_parallel_degree=3))
        forward = P2PChannel(get_pp_group(), max_pending=4)
        feedback = P2PChannel(get_pp_group(), feedback=True)
        seen = []
        if rank == 0:
            for i in range(20):
                forward.send(torch.full((1000, 1), float(i)).expand(-1, 2), 1)
            for _ in range(20):
                seen.append(feedback.recv(torch.empty(1000, 2), 2)[-1, -1].item())
        else:
            for _ in range(20):
                x = forward.recv(torch.empty(1000, 2), rank - 1) + 1
                forward.send(x, 2) if rank == 1 else feedback.send(x, 0)
        forward.wait()
        feedback.wait()
        return seen

    assert run_ranks(pass_on, 3)[0] == [float(i + 2) for i in range(20)]


def test_channel_lets_go_of_what_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with the messages of a call: it is the receiver's once they are sent."""

    class Sent:
        done = False

        def is_completed(self) -> bool:
            return self.done

        def wait(self) -> None:
            assert self.done, "the sender waited for a message in flight"

    works: list[Sent] = []

    def isend(*_: object, **__: object) -> Sent:
        works.append(Sent())
        return works[-1]

    monkeypatch.setattr(dist, "isend", isend)
    channel = P2PChannel(Group((0, 1)))
    for _ in range(5):
        channel.send(torch.zeros(4), 1)
        for work in works[:-1]:
            work.done = True
    assert len(channel._pending) == 2


def test_receiving_can_overlap_with_work() -> None:
    def overlap(rank: int) -> float:
        initialize_model_parallel(ParallelConfig(pipefusion_parallel_degree=2))
        channel = P2PChannel(get_pp_group())
        buffer = torch.empty(4)
        handle = channel.irecv(buffer, 1 - rank)
        channel.send(torch.full((4,), float(rank)), 1 - rank)
        handle.wait()
        channel.wait()
        dist.barrier()
        return buffer.sum().item()

    assert run_ranks(overlap, 2) == [4, 0]


def test_a_captured_call_sends_when_it_is_replayed() -> None:
    """Each replay sends what its tensors hold then, as a copy that the next may not write to."""

    def replay(rank: int) -> list[float]:
        initialize_model_parallel(ParallelConfig(pipefusion_parallel_degree=2))
        channel = P2PChannel(get_pp_group())
        steps: list[Any] = []
        channel.recorder = steps.append
        static = torch.zeros(4)
        if rank == 0:
            channel.send(static, 1)
        else:
            assert channel.recv(static, 0) is static
        channel.recorder = None
        assert len(steps) == 1 and not channel._pending
        seen = []
        for value in (1.0, 2.0):
            if rank == 0:
                static.fill_(value)
            steps[0]()
            if rank == 0:
                static.fill_(-1)
            seen.append(static.sum().item())
        channel.wait()
        return seen

    assert run_ranks(replay, 2)[1] == [4, 8]
