"""Ring attention: blocks of keys go round the ranks while each computes on the one it has.

The transfer of the next block is posted before the computation on the present one, so the
two overlap; two sets of buffers take turns. Blocks merge by log-sum-exp in fp32 (fp64 for
fp64 inputs). Blocks may have any lengths, also none, and rows may be masked in some blocks or
in all (their output is 0).

Shapes: B batch, S query rows, K_r key rows of block r, H query heads, G key heads, D head
dimension. Not differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from xfuser_runtime.attention.backends import run_kernel
from xfuser_runtime.attention.kernels import KernelCall, accumulation_dtype
from xfuser_runtime.attention.keys import KeyBlock
from xfuser_runtime.distributed.parallel_state import Group


@dataclass
class Partial:
    """Attention over the blocks seen so far.

    Args:
        out: (B, S, H, Dv) in fp32 or fp64.
        lse: (B, H, S), -inf where no key took part yet.
    """

    out: torch.Tensor
    lse: torch.Tensor

    def merge(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Take in the attention over one more block, weighted by the softmax mass of both."""
        # Both -inf: neither has a key, the difference is NaN and the weight must be 0.
        weight = torch.sigmoid(lse - self.lse).nan_to_num_(0.0)
        self.out.lerp_(out.to(self.out.dtype), weight.transpose(1, 2).unsqueeze(-1))
        self.lse = torch.logaddexp(self.lse, lse)


def ring_attention(
    query: torch.Tensor,
    block: KeyBlock,
    *,
    lengths: Sequence[int],
    row_masks: Sequence[torch.Tensor] | None = None,
    scale: float | None = None,
    backend: str | None = None,
    group: Group,
) -> torch.Tensor:
    """Attention of the local queries over the keys of all ranks of the ring.

    Args:
        query: (B, S, H, D).
        block: this rank's keys, with their key mask or None on all ranks.
        lengths: key rows of each rank's block.
        row_masks: for each rank's block, the mask (B or 1, H or 1, S, K_r) of the local
            query rows; stays here while the keys travel.
        scale: factor of the scores, None for D ** -0.5.
        backend: name of the kernel, None to choose; it must return the log-sum-exp.
        group: the ring.

    Returns:
        The output (B, S, H, Dv) in the query's data type.
    """
    size, rank = group.world_size, group.rank_in_group
    current = _dense(block)
    spare = [_Buffers(current, max(lengths)) for _ in range(min(size - 1, 2))]
    total: Partial | None = None
    for step in range(size):
        source = (rank - step) % size
        arriving, transfers = current, []
        if step + 1 < size:
            arriving = spare[step % 2].view(lengths[(source - 1) % size])
            transfers = _post_transfer(current, arriving, group)
        mask = current.mask if row_masks is None else row_masks[source]
        call = KernelCall(query, current.key, current.value, mask, scale=scale)
        out, lse = run_kernel(call, name=backend, need_lse=True)
        assert lse is not None
        if total is None:
            dtype = accumulation_dtype(query.dtype)
            total = Partial(out.to(dtype), lse.to(dtype))
        else:
            total.merge(out, lse)
        for transfer in transfers:
            transfer.wait()
        current = arriving
    assert total is not None
    return total.out.to(query.dtype)


class _Buffers:
    """Memory for one travelling block of up to `rows` rows."""

    def __init__(self, like: KeyBlock, rows: int) -> None:
        self._like = like
        self._flat = [
            x.new_empty(_resized(x, dim, rows).numel())
            for x, dim in zip(_tensors(like), _ROW_DIMS, strict=False)
        ]

    def view(self, rows: int) -> KeyBlock:
        """A dense block of `rows` rows in this memory."""
        views = []
        for flat, x, dim in zip(
            self._flat, _tensors(self._like), _ROW_DIMS, strict=False
        ):
            shape = _resized(x, dim, rows)
            views.append(flat[: shape.numel()].view(shape))
        return KeyBlock(*views)


# Where the rows are in a key, a value and a key mask.
_ROW_DIMS = (1, 1, 3)


def _resized(x: torch.Tensor, dim: int, rows: int) -> torch.Size:
    return torch.Size((*x.shape[:dim], rows, *x.shape[dim + 1 :]))


def _tensors(block: KeyBlock) -> list[torch.Tensor]:
    held = [block.key, block.value]
    return held if block.mask is None else [*held, block.mask]


def _dense(block: KeyBlock) -> KeyBlock:
    return KeyBlock(*(x.contiguous() for x in _tensors(block)))


def _post_transfer(
    leaving: KeyBlock, arriving: KeyBlock, group: Group
) -> list[dist.Work]:
    """Start sending a block to the next rank and receiving one from the previous."""
    ranks, here = group.ranks, group.rank_in_group
    following = ranks[(here + 1) % group.world_size]
    previous = ranks[(here - 1) % group.world_size]
    operations = []
    for tag, (out, into) in enumerate(
        zip(_tensors(leaving), _tensors(arriving), strict=True)
    ):
        # Both sides know all lengths, so nothing is sent for a block without rows.
        if out.numel():
            operations.append(
                dist.P2POp(dist.isend, _bytes(out), following, group.process_group, tag)
            )
        if into.numel():
            operations.append(
                dist.P2POp(dist.irecv, _bytes(into), previous, group.process_group, tag)
            )
    return dist.batch_isend_irecv(operations) if operations else []


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """A bool tensor as bytes, which every transport takes."""
    return x.view(torch.uint8) if x.dtype == torch.bool else x
