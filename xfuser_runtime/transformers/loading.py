"""Loading of one stage's part of a transformer: foreign blocks are never read.

The stock `from_pretrained` does the work (data types, shards, variants, quantisation). It is called
on a subclass whose `__init__` leaves foreign blocks empty. diffusers makes the modules on the
meta device and maps the files into memory, so that of the blocks' weights only those that the
model asks for are read.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from xfuser_runtime.base_wrapper import swap_class
from xfuser_runtime.distributed import parallel_state
from xfuser_runtime.transformers.stages import (
    StagePlan,
    drop_foreign_blocks,
    plan_stages,
)

_PLAN = "_xfuser_stage_plan"
#: diffusers looks here for patterns of keys that a checkpoint may have too many.
_IGNORED = "_keys_to_ignore_on_load_unexpected"


def load_part(
    original: Any,
    loops: Iterable[str],
    path: str | Path,
    *,
    parts: Mapping[str, Sequence[str]] | None = None,
    **options: Any,
) -> nn.Module:
    """`original.from_pretrained(path, **options)` with the blocks of this rank's stage.

    Args:
        original: class of diffusers.
        loops: attribute names of its block lists, in the order in which they run.
        path: as `from_pretrained` takes it.
        parts: by a block's path, what every stage keeps of it.
        options: likewise.

    Returns:
        An instance of `original` whose foreign blocks are `EmptyBlock`s.
    """
    loops = tuple(loops)
    ignored = list(getattr(original, _IGNORED, None) or [])

    @functools.wraps(original.__init__)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original.__init__(self, *args, **kwargs)
        plan = plan_stages(
            self, loops, parallel_state.get_pipeline_parallel_world_size()
        )
        stage = parallel_state.get_pipeline_parallel_rank()
        foreign = drop_foreign_blocks(self, plan, stage, parts)
        ignored.extend(rf"^{re.escape(block)}\." for block in foreign)
        vars(self)[_PLAN] = plan

    # Of the same name: diffusers compares it with the one in the checkpoint.
    part = type(original)(
        original.__name__, (original,), {"__init__": init, _IGNORED: ignored}
    )
    model: nn.Module = part.from_pretrained(path, **options)
    swap_class(model, original)
    return model


def plan_of_part(model: nn.Module, num_stages: int) -> StagePlan | None:
    """The stages by which `load_part` loaded a model; None for a whole model.

    Raises:
        ValueError: it was loaded for another number of stages.
    """
    plan: StagePlan | None = vars(model).get(_PLAN)
    if plan is not None and plan.num_stages != num_stages:
        raise ValueError(
            f"a transformer loaded for {plan.num_stages} pipeline stages in a session of "
            f"{num_stages}, expected the same number; load it again"
        )
    return plan
