"""Joint attention in which the text tokens alone take part that a mask marks.

Upstream's processor picks these tokens by their indices and puts zeros behind what comes out.
On cut tokens they would be another number on each rank, so all of them stay: the mask goes
with the keys, and what comes out for the others is zeroed.  That is the same where the
marked tokens stand in front, as those of a prompt with padding behind it do.

Shapes: K keys of this rank, the text last; T text tokens of this rank.
"""

from __future__ import annotations

from typing import Any

import torch

from xfuser_runtime.distributed.collectives import all_gather
from xfuser_runtime.distributed.parallel_state import get_sp_group
from xfuser_runtime.errors import InputError


def kept_rows(present: torch.Tensor, rows: int) -> torch.Tensor:
    """Which of all rows take part, (K,): those before the text always.

    Args:
        present: the mask, (T,).
        rows: K.
    """
    before = present.new_ones(rows - len(present), dtype=torch.bool)
    return torch.cat([before, present.bool()])


def check_in_front(present: torch.Tensor, region: Any, name: str) -> None:
    """Refuse a mask that marks a token behind one that it leaves out.

    Args:
        present: this rank's part of the mask, (T,).
        region: the region of the pass.
        name: the segment of the text.

    Raises:
        InputError: upstream would move the tokens.
    """
    lengths = region.layout.lengths((name,), region.patch)
    whole = all_gather(present.to(torch.uint8), 0, lengths, get_sp_group())
    if bool((whole[1:] > whole[:-1]).any()):
        raise InputError(
            "a mask of the prompt with padding before its end, expected padding behind the "
            "prompt; run without ulysses_degree and ring_degree"
        )
