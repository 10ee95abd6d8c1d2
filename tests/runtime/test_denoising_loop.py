"""Two stages of a loop that carries two latents: a video's and its sound's."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from tests.ranks import run_ranks
from xfuser_runtime.config import EngineConfig, ParallelConfig
from xfuser_runtime.distributed import initialize_model_parallel, parallel_state
from xfuser_runtime.distributed.runtime_state import initialize_runtime_state
from xfuser_runtime.pipelines import base_pipeline
from xfuser_runtime.pipelines.base_pipeline import xFuserPipelineBaseWrapper
from xfuser_runtime.pipelines.denoising_loop import DenoisingLoop
from xfuser_runtime.replay.faults import injected

STEPS = 4
CALLED = SimpleNamespace(call_index=0)


def _run(
    rank: int, has_callback: bool, fault: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last stage adds 1 to the video and 10 to the sound, which comes in half."""
    config = ParallelConfig(pipefusion_parallel_degree=2)
    state = initialize_runtime_state(EngineConfig(parallel_config=config))
    initialize_model_parallel(config)
    loop = DenoisingLoop(list(range(STEPS)), STEPS, state, has_callback=has_callback)
    is_last = parallel_state.is_pipeline_last_stage()
    latents = torch.zeros(2, 3), torch.zeros(2, 5, dtype=torch.float64)
    seen = []
    with injected(fault) if fault else contextlib.nullcontext():
        for _ in loop.sync_steps():
            before = video, sound = loop.receive(*latents)
            seen.append(torch.stack([video.mean(), sound.mean().float()]))
            after = (video + is_last, (sound + 10 * is_last).half())
            latents = loop.commit(before, after)
            assert [x.dtype for x in latents] == [torch.float32, torch.float16]
        loop.finish_sends()
    torch.distributed.barrier()
    return torch.stack(seen), torch.stack([x.mean().float() for x in latents])


@pytest.mark.parametrize("has_callback", [False, True])
def test_all_latents_come_back_to_the_first_stage(has_callback: bool) -> None:
    expected = torch.tensor([[1.0, 10.0]])
    starts = torch.arange(STEPS)[:, None] * expected
    (first, held), (last, final) = run_ranks(_run, 2, has_callback, None)
    assert torch.equal(first, starts) and torch.equal(last, starts)
    assert torch.equal(final, STEPS * expected[0])
    # With a callback every stage holds whole latents after a step.
    assert torch.equal(held, final if has_callback else starts[-1])


def test_the_fault_drops_the_further_ones_alone() -> None:
    (first, _), _ = run_ranks(_run, 2, False, "further_latents_dropped")
    assert first[:, 0].tolist() == [0, 1, 2, 3]
    assert first[:, 1].tolist() == [0, 0, 0, 0]


def test_latents_that_a_call_does_without_are_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Loop:
        """Adds 1 to what it is given."""

        def receive(self, *latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(x + 1 for x in latents)

        def commit(
            self, before: tuple[torch.Tensor, ...], after: tuple[torch.Tensor, ...]
        ) -> tuple[torch.Tensor, ...]:
            assert len(before) == len(after)
            return self.receive(*after)

    pipeline = object.__new__(xFuserPipelineBaseWrapper)
    vars(pipeline)["_xfuser_loop"] = Loop()
    monkeypatch.setattr(base_pipeline, "get_runtime_state", lambda: CALLED)
    video = torch.zeros(2)
    before = received, sound = pipeline._receive_patch(video, None)
    assert sound is None and torch.equal(received, video + 1)
    committed, sound = pipeline._commit_patch(before, received, sound)
    assert sound is None and torch.equal(committed, video + 2)
    alone = pipeline._receive_patch(video)
    assert torch.equal(pipeline._commit_patch(alone, alone), video + 2)
    skipped, sound = pipeline._skip_patch(video, None)
    assert sound is None and torch.equal(skipped, video + 1)
