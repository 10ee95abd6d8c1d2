"""Which stages hold which latents at the end of a step, of a loop, and in the next loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from xfuser_runtime import xFuserArgs
from xfuser_runtime.distributed import get_runtime_state
from xfuser_runtime.distributed.launch import prepare_environment
from xfuser_runtime.distributed.layout import Segment, TokenLayout
from xfuser_runtime.pipelines.denoising_loop import DenoisingLoop, Share

STAGES, STEPS, ROWS = 3, 3, 4


def _seen(
    rank: int, patches: int, share: Share | None, *, callback: bool = False
) -> list[torch.Tensor]:
    """The latents at the top of each pass on this rank, and those behind the loop.

    The last stage adds one to the latents; the others do not know what it made.
    """
    arguments = xFuserArgs(
        pipefusion_parallel_degree=STAGES,
        num_pipeline_patch=patches,
        warmup_steps=1,
        allow_unproven=True,
    )
    prepare_environment(arguments.create_config()[0])
    state = get_runtime_state()
    loop = DenoisingLoop(
        list(range(STEPS)), 1, state, has_callback=callback, share=share
    )
    latents, seen = torch.zeros(1, ROWS), []
    layout = TokenLayout((Segment("image", ROWS, follows_latents=True),), patches, 1)
    for passes in (loop.sync_steps(), loop.async_steps()):
        for _ in passes:
            (before,) = (latents,) = loop.receive(latents)
            seen.append(before.clone())
            state.adopt_patch_borders(layout, 1, ROWS)
            stepped = before + 1 if rank == STAGES - 1 else before
            (latents,) = loop.commit((before,), (stepped,))
    loop.finish_sends()
    state.end_passes()
    return [*seen, latents]


def _run(patches: int, share: Share | None, **options: Any) -> list[list[torch.Tensor]]:
    """What `_seen` found, by rank."""
    found: list[list[torch.Tensor]] = run_ranks(
        lambda rank: _seen(rank, patches, share, **options), STAGES
    )
    return found


def test_the_first_stage_alone_gets_the_latents_that_nothing_else_reads() -> None:
    first, middle, last = _run(1, None)
    assert [int(x.mean()) for x in first] == [0, 1, 2, 2]
    assert [int(x.mean()) for x in middle] == [0, 0, 0, 0]
    assert [int(x.mean()) for x in last] == [0, 1, 2, 3]


def test_every_stage_has_the_latents_behind_a_shared_loop() -> None:
    first, middle, last = _run(1, "loop")
    assert [int(x.mean()) for x in first] == [0, 1, 2, 3]
    assert [int(x.mean()) for x in middle] == [0, 0, 0, 3]
    assert [int(x.mean()) for x in last] == [0, 1, 2, 3]


@pytest.mark.parametrize("options", [{}, {"callback": True}])
def test_every_stage_begins_each_pass_of_a_shared_step_alike(
    options: dict[str, Any],
) -> None:
    for seen in _run(2, "steps", **options):
        assert [x.unique().tolist() for x in seen] == [[0], [1], [1], [2], [2], [3]]


def test_patches_of_a_shared_loop_end_whole_on_every_stage() -> None:
    for seen in _run(2, "loop"):
        assert seen[-1].unique().tolist() == [3]
