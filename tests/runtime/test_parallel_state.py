"""Groups in xDiT's rank order, with and without a process group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, run_ranks
from xfuser_runtime import distributed
from xfuser_runtime.config import EngineConfig, InputConfig, ParallelConfig
from xfuser_runtime.distributed import parallel_state
from xfuser_runtime.distributed.layout import Segment, TokenLayout
from xfuser_runtime.distributed.runtime_state import LatentSlice, RuntimeState
from xfuser_runtime.errors import ConfigError, InputError, StateError

DEGREES = ["data_parallel", "classifier_free_guidance", "pipeline_parallel"]
DEGREES += ["ring_parallel", "ulysses_parallel", "sequence_parallel"]
GROUPS = ["world", "dp", "cfg", "pp", "ring", "ulysses", "sp", "replica"]


def _group(name: str) -> parallel_state.Group:
    group: parallel_state.Group = getattr(distributed, f"get_{name}_group")()
    return group


def _describe(rank: int, config: ParallelConfig) -> dict[str, Any]:
    parallel_state.initialize_model_parallel(config)
    facts: dict[str, Any] = {name: _group(name).ranks for name in GROUPS}
    for name in GROUPS:
        group = _group(name)
        assert group.ranks[group.rank_in_group] == rank
        assert (group.process_group is None) == (group.world_size == 1)
        if group.process_group is not None:
            assert dist.get_process_group_ranks(group.process_group) == list(
                group.ranks
            )
            # The group's ranks are who really takes part.
            total = torch.tensor(10**rank)
            dist.all_reduce(total, group=group.process_group)
            assert total.item() == sum(10**r for r in group.ranks)
    feedback = _group("pp").feedback_group
    assert (feedback is None) == (_group("pp").world_size == 1)
    if feedback is not None:
        assert feedback is not _group("pp").process_group
        assert dist.get_process_group_ranks(feedback) == list(_group("pp").ranks)
    for name in DEGREES:
        facts[f"{name}_rank"] = getattr(distributed, f"get_{name}_rank")()
    facts["first"] = distributed.is_pipeline_first_stage()
    facts["last"] = distributed.is_pipeline_last_stage()
    facts["returns"] = distributed.is_dp_last_group()
    return facts


def test_two_ranks_of_each_kind() -> None:
    """pp 2 x ring 2 x ulysses 2: ulysses fastest."""
    config = ParallelConfig(
        pipefusion_parallel_degree=2, ring_degree=2, ulysses_degree=2
    )
    facts = run_ranks(_describe, 8, config)
    assert facts[5]["ulysses"] == (4, 5)
    assert facts[5]["ring"] == (5, 7)
    assert facts[5]["sp"] == (4, 5, 6, 7)
    assert facts[5]["pp"] == (1, 5)
    assert facts[5]["cfg"] == facts[5]["dp"] == (5,)
    assert facts[5]["replica"] == facts[5]["world"] == tuple(range(8))
    for rank in range(8):
        pp, sp = divmod(rank, 4)
        assert facts[rank]["pipeline_parallel_rank"] == pp
        assert facts[rank]["sequence_parallel_rank"] == sp
        assert (
            facts[rank]["ring_parallel_rank"],
            facts[rank]["ulysses_parallel_rank"],
        ) == (divmod(sp, 2))
        assert (facts[rank]["first"], facts[rank]["last"]) == (pp == 0, pp == 1)
        assert facts[rank]["returns"] == (rank == 7)


def test_replicas_and_guidance() -> None:
    config = ParallelConfig(
        data_parallel_degree=2, use_cfg_parallel=True, ulysses_degree=2
    )
    facts = run_ranks(_describe, 8, config)
    assert facts[6]["dp"] == (2, 6)
    assert facts[6]["cfg"] == (4, 6)
    assert facts[6]["ulysses"] == facts[6]["sp"] == (6, 7)
    assert facts[6]["replica"] == (4, 5, 6, 7)
    assert [fact["returns"] for fact in facts] == [False] * 3 + [True] + [False] * 3 + [
        True
    ]
    assert [fact["data_parallel_rank"] for fact in facts] == [0] * 4 + [1] * 4
    assert [fact["classifier_free_guidance_rank"] for fact in facts] == [0, 0, 1, 1] * 2


def test_ring_alone_is_the_sequence_group() -> None:
    facts = run_ranks(_describe, 2, ParallelConfig(ring_degree=2))
    assert facts[1]["sp"] == facts[1]["ring"] == (0, 1)
    assert facts[1]["sequence_parallel_rank"] == 1


def test_every_accessor_works_in_one_process() -> None:
    for name in GROUPS:
        assert _group(name) == parallel_state.Group()
    for name in DEGREES:
        assert getattr(distributed, f"get_{name}_rank")() == 0
        assert getattr(distributed, f"get_{name}_world_size")() == 1
    assert distributed.is_pipeline_first_stage()
    assert distributed.is_pipeline_last_stage()
    assert distributed.is_dp_last_group()


def test_degrees_are_checked_before_any_group_is_made() -> None:
    def wrong(rank: int) -> str:
        # Rank 1 never comes: a collective would hang here.
        if rank == 1:
            return ""
        with pytest.raises(ConfigError) as caught:
            parallel_state.initialize_model_parallel(ParallelConfig(ring_degree=3))
        return str(caught.value)

    assert "= 3 ranks, expected the world size 2" in run_ranks(wrong, 2)[0]


def test_groups_can_be_made_again_after_destroy() -> None:
    def again(rank: int) -> tuple[int, int, int]:
        parallel_state.initialize_model_parallel(ParallelConfig(ulysses_degree=2))
        with pytest.raises(ConfigError, match="call destroy_model_parallel first"):
            parallel_state.initialize_model_parallel(ParallelConfig(ulysses_degree=2))
        before = distributed.get_ulysses_parallel_world_size()
        parallel_state.destroy_model_parallel()
        between = distributed.get_ulysses_parallel_world_size()
        parallel_state.initialize_model_parallel(ParallelConfig(use_cfg_parallel=True))
        return before, between, distributed.get_classifier_free_guidance_world_size()

    assert run_ranks(again, 2) == [(2, 1, 2)] * 2


def test_a_process_group_of_another_size_is_refused() -> None:
    def other(rank: int) -> None:
        with pytest.raises(ConfigError, match="a process group of 2 ranks, expected 4"):
            parallel_state.init_distributed_environment(rank, 4)

    run_ranks(other, 2)


def test_dry_run_makes_every_rank_first_and_last() -> None:
    def dry(rank: int) -> tuple[bool, ...]:
        parallel_state.initialize_model_parallel(
            ParallelConfig(pipefusion_parallel_degree=3)
        )
        state = RuntimeState(EngineConfig(ParallelConfig(pipefusion_parallel_degree=3)))
        before = distributed.is_pipeline_last_stage()
        with parallel_state.dry_run():
            assert state.dry_run
            within = (
                distributed.is_pipeline_first_stage(),
                distributed.is_pipeline_last_stage(),
            )
        state.dry_run = True
        by_state = distributed.is_pipeline_last_stage()
        state.dry_run = False
        return before, *within, by_state, distributed.is_pipeline_last_stage()

    results = run_ranks(dry, 3)
    assert results[0] == (False, True, True, True, False)
    assert results[2] == (True, True, True, True, True)


def test_the_forked_ranks_report_what_went_wrong() -> None:
    def bad(rank: int) -> None:
        if rank == 1:
            raise ValueError("boom")
        dist.barrier()

    with pytest.raises(RankError, match="rank 1: Traceback(.|\n)*ValueError: boom"):
        run_ranks(bad, 2)


def test_the_forked_ranks_do_not_wait_for_ever() -> None:
    def late(rank: int) -> None:
        torch.zeros(1) if rank == 0 else dist.recv(torch.zeros(1), 0)

    with pytest.raises(RankError, match="did not end within 3 s"):
        run_ranks(late, 2, timeout=3)


# -- runtime state ---------------------------------------------------------------------


def test_runtime_state_must_be_initialised() -> None:
    assert not distributed.runtime_state_is_initialized()
    with pytest.raises(StateError, match="no runtime state, expected one"):
        distributed.get_runtime_state()
    try:
        state = distributed.initialize_runtime_state(EngineConfig(world_size=1))
        assert distributed.get_runtime_state() is state
    finally:
        distributed.destroy_runtime_state()
    assert not distributed.runtime_state_is_initialized()


def test_input_parameters_are_taken_over_and_checked() -> None:
    state = RuntimeState(EngineConfig(world_size=1))
    state.set_input_parameters(
        height=64, width=None, batch_size=2, num_inference_steps=5
    )
    state.set_input_parameters(height=None)
    assert state.input_config == InputConfig(
        height=64, batch_size=2, num_inference_steps=5
    )
    assert state.num_steps == 5
    with pytest.raises(
        InputError, match="input parameter 'heigth', expected one of .*height"
    ):
        state.set_input_parameters(heigth=64)


def test_passes() -> None:
    state = RuntimeState(EngineConfig(world_size=1))
    assert (state.step, state.patch, state.call_index) == (-1, None, -1)
    state.num_patches = 2
    state.start_pass(step=0, patch=None)
    state.enter_transformer_call()
    state.enter_transformer_call()
    assert state.call_index == 1
    state.start_pass(step=1, patch=0)
    assert (state.step, state.patch, state.call_index) == (1, 0, -1)
    state.cfg_batch_is_split = True
    state.end_passes()
    assert (state.step, state.patch, state.num_patches) == (-1, None, 1)
    assert not state.cfg_batch_is_split


def _layout(text: int) -> TokenLayout:
    return TokenLayout((Segment("text", text), Segment("image", 64, 8, True)), 2, 1)


@pytest.mark.parametrize(
    ("shape", "dim", "first", "second"),
    [
        ((1, 4, 16, 16), 2, LatentSlice(2, 0, 8), LatentSlice(2, 8, 16)),
        ((1, 64, 4), 1, LatentSlice(1, 0, 32), LatentSlice(1, 32, 64)),
        ((1, 4, 8, 9, 9), 2, LatentSlice(2, 0, 4), LatentSlice(2, 4, 8)),
        ((1, 8, 4, 9, 9), 1, LatentSlice(1, 0, 4), LatentSlice(1, 4, 8)),
    ],
)
def test_the_first_region_of_a_call_sets_the_region_of_the_latents(
    shape: tuple[int, ...], dim: int, first: LatentSlice, second: LatentSlice
) -> None:
    state = RuntimeState(EngineConfig(world_size=1))
    state.start_pass(step=0, patch=0)
    state.latents_shape = shape
    assert state.latent_slice is None
    state.adopt_patch_borders(_layout(16), dim, shape[dim])
    assert state.latent_slice == first
    # A branch with another text has the same latents.
    state.adopt_patch_borders(_layout(48), dim, shape[dim])
    assert state.latent_slice == first
    fewer = TokenLayout((Segment("image", 32, 8, True),), 2, 1)
    with pytest.raises(ValueError, match="4 latent rows after one of 8"):
        state.adopt_patch_borders(fewer, dim, shape[dim])
    state.start_pass(step=0, patch=1)
    assert state.latent_slice == second
    state.start_pass(step=1, patch=None)
    assert state.latent_slice is None
    state.end_passes()
    state.start_pass(step=0, patch=0)
    state.latents_shape = shape
    assert state.latent_slice is None


def test_a_region_of_text_alone_sets_no_borders() -> None:
    state = RuntimeState(EngineConfig(world_size=1))
    state.start_pass(step=0, patch=0)
    state.latents_shape = (1, 64, 4)
    state.adopt_patch_borders(TokenLayout((Segment("text", 5),), 2, 1), 1, 16)
    assert state.latent_slice is None
    state.adopt_patch_borders(_layout(16), 1, 64)
    assert state.latent_slice == LatentSlice(1, 0, 32)


def test_latents_that_are_not_the_transformers_are_refused() -> None:
    state = RuntimeState(EngineConfig(world_size=1))
    state.start_pass(step=0, patch=0)
    state.latents_shape = (1, 4, 24, 16)
    with pytest.raises(InputError, match="expected 16 along dimension 2"):
        state.adopt_patch_borders(_layout(16), 2, 16)


def test_latent_slice_reads_and_writes_its_region() -> None:
    whole = torch.arange(8.0).view(1, 4, 2)
    region = LatentSlice(1, 1, 3)
    assert region.length == 2
    assert region.narrow(whole).flatten().tolist() == [2, 3, 4, 5]
    written = region.write(whole, torch.zeros(1, 2, 2))
    assert written.flatten().tolist() == [0, 1, 0, 0, 0, 0, 6, 7]
    assert whole.flatten().tolist() == list(range(8))
