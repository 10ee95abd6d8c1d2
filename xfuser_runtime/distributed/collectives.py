"""Collectives whose shapes come from integers that both sides know: no shape is ever exchanged.

`all_gather` and the all-to-alls are torch's functional collectives, which torch.compile traces
without a graph break and a CUDA graph captures. They are called as operators: the Python functions
around them change their names between torch versions. All work on gloo and NCCL.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from xfuser_runtime.distributed.parallel_state import Group


def all_gather(
    x: torch.Tensor, dim: int, lengths: Sequence[int], group: Group
) -> torch.Tensor:
    """Concatenate the ranks' ``x`` along ``dim``.

    Args:
        x: this rank's rows; all other extents are equal on all ranks.
        dim: dimension of the rows.
        lengths: extent of ``dim`` on each rank of the group; may differ and may be 0.
        group: who takes part.

    Raises:
        ValueError: ``lengths`` does not fit the group or ``x``.
    """
    dim %= x.dim()
    if len(lengths) != group.world_size or x.shape[dim] != lengths[group.rank_in_group]:
        raise ValueError(
            f"lengths {tuple(lengths)} for {group.world_size} ranks and {x.shape[dim]} rows on rank"
            f" {group.rank_in_group} of the group, expected one length a rank"
        )
    if group.world_size == 1:
        return x
    longest = max(lengths)
    if longest == 0:
        return x
    if x.shape[dim] < longest:
        # Uneven rows travel padded: one collective of even size is what every backend does fastest.
        padding = [0, 0] * (x.dim() - 1 - dim) + [0, longest - x.shape[dim]]
        x = F.pad(x, padding)
    stacked = torch.ops._c10d_functional.wait_tensor(
        torch.ops._c10d_functional.all_gather_into_tensor(
            x.contiguous(), group.world_size, group.name
        )
    )
    pieces = stacked.unflatten(0, (group.world_size, x.shape[0])).unbind(0)
    if min(lengths) == longest and all(size == 1 for size in x.shape[:dim]):
        # The pieces already lie one after the other.
        return stacked.view(*x.shape[:dim], -1, *x.shape[dim + 1 :])
    return torch.cat(
        [piece.narrow(dim, 0, n) for piece, n in zip(pieces, lengths, strict=True)], dim
    )


def all_to_all_flat(
    x: torch.Tensor,
    output_splits: Sequence[int],
    input_splits: Sequence[int],
    group: Group,
) -> torch.Tensor:
    """Send consecutive elements of flat ``x`` to the ranks in order and take theirs.

    Args:
        x: 1-d, contiguous; ``input_splits[r]`` of its elements go to rank r.
        output_splits: elements that come from each rank; 0 is allowed.
        input_splits: elements that go to each rank; 0 is allowed.
        group: who takes part.
    """
    if group.world_size == 1:
        return x
    return torch.ops._c10d_functional.wait_tensor(
        torch.ops._c10d_functional.all_to_all_single(
            x, list(output_splits), list(input_splits), group.name
        )
    )


def all_to_all(
    pieces: Sequence[Sequence[torch.Tensor]],
    shapes: Sequence[Sequence[Sequence[int]]],
    group: Group,
) -> list[list[torch.Tensor]]:
    """Exchange several tensors with every rank in one collective.

    Args:
        pieces: ``pieces[r]`` are the tensors for rank r, all of one dtype and device.
        shapes: ``shapes[r]`` are the shapes of the tensors that come from rank r.
        group: who takes part.

    Returns:
        The received tensors, as ``shapes`` lists them: views of one buffer.

    Raises:
        ValueError: not one list of pieces and of shapes a rank.
    """
    if len(pieces) != group.world_size or len(shapes) != group.world_size:
        raise ValueError(
            f"pieces for {len(pieces)} and shapes from {len(shapes)} ranks, expected"
            f" {group.world_size} of each"
        )
    sizes = [[_numel(shape) for shape in row] for row in shapes]
    sent = torch.cat([piece.reshape(-1) for row in pieces for piece in row])
    received = all_to_all_flat(
        sent,
        [sum(row) for row in sizes],
        [sum(piece.numel() for piece in row) for row in pieces],
        group,
    )
    flat = iter(received.split([size for row in sizes for size in row]))
    return [[next(flat).view(*shape) for shape in row] for row in shapes]


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count


def all_reduce_sum(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The elementwise sum over the group, on every rank; ``x`` is not changed."""
    if group.world_size == 1:
        return x
    return torch.ops._c10d_functional.wait_tensor(
        torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group.name)
    )


def all_reduce_max(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The elementwise maximum over the group, on every rank; ``x`` is not changed."""
    result = x.clone()
    if group.world_size > 1:
        dist.all_reduce(result, dist.ReduceOp.MAX, group=group.process_group)
    return result


def broadcast(x: torch.Tensor, group: Group, source: int = 0) -> torch.Tensor:
    """Overwrite ``x`` with that of rank ``source`` of the group; returns ``x``."""
    if group.world_size > 1:
        dist.broadcast(x, group.ranks[source], group=group.process_group)
    return x


def broadcast_object(value: Any, group: Group, source: int = 0) -> Any:
    """The picklable ``value`` of rank ``source`` of the group; for set-up, not for the hot path."""
    if group.world_size == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, group.ranks[source], group=group.process_group)
    return held[0]


def gather_objects(value: Any, group: Group) -> list[Any]:
    """The picklable values of all ranks of the group, in its order; for set-up."""
    if group.world_size == 1:
        return [value]
    held: list[Any] = [None] * group.world_size
    dist.all_gather_object(held, value, group=group.process_group)
    return held


class P2PChannel:
    """Point-to-point messages between the ranks of a group, in order for each pair.

    A send returns at once; the channel keeps its handle and its tensor until it is done. While a
    call is captured nothing is sent or received: what would be is told to ``recorder``.

    Args:
        group: the ranks.
        feedback: use the group's second communicator.
        max_pending: unfinished sends that are kept before the oldest is waited for. More than a step
            puts in flight, or sender and receiver could wait for each other.
    """

    def __init__(
        self, group: Group, *, feedback: bool = False, max_pending: int = 64
    ) -> None:
        self._group = group
        self._process_group = group.feedback_group if feedback else group.process_group
        self._max_pending = max_pending
        self._pending: deque[tuple[dist.Work, torch.Tensor]] = deque()
        #: Takes the messages of a call that is captured, to be sent whenever it is replayed.
        self.recorder: Callable[[Callable[[], object]], None] | None = None

    def send(self, x: torch.Tensor, target: int) -> None:
        """Send ``x`` to rank ``target`` of the group; the caller must not write to it again."""
        if self.recorder is None:
            self._send(x, target)
        else:
            # A replay that comes before the message has left writes to the same memory.
            self.recorder(lambda: self._send(x.clone(), target))

    def _send(self, x: torch.Tensor, target: int) -> None:
        x = x.contiguous()
        work = dist.isend(x, self._group.ranks[target], group=self._process_group)
        assert work is not None
        # A tensor is let go as soon as it has left: kept to the end, they would pile up.
        while self._pending and self._pending[0][0].is_completed():
            self._pending.popleft()[0].wait()
        self._pending.append((work, x))
        while len(self._pending) > self._max_pending:
            self._pending.popleft()[0].wait()

    def recv(self, buffer: torch.Tensor, source: int) -> torch.Tensor:
        """Fill contiguous ``buffer`` with the next message of rank ``source``; returns it."""
        if self.recorder is None:
            self.irecv(buffer, source).wait()
        else:
            self.recorder(lambda: self.irecv(buffer, source).wait())
        return buffer

    def irecv(self, buffer: torch.Tensor, source: int) -> dist.Work:
        """Start to receive into contiguous ``buffer``; wait on the returned handle before reading."""
        work = dist.irecv(buffer, self._group.ranks[source], group=self._process_group)
        assert work is not None
        return work

    def wait(self) -> None:
        """Wait until all sends are done."""
        while self._pending:
            self._pending.popleft()[0].wait()
