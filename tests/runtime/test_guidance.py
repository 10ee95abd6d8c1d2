"""Two CFG ranks: lists of both branches, a guider's entries, and guiders that do not split."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedMixGuidance,
    ClassifierFreeGuidance,
    SkipLayerGuidance,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from tests.ranks import RankError, run_ranks
from xfuser_runtime.config import EngineConfig, ParallelConfig
from xfuser_runtime.distributed import initialize_model_parallel
from xfuser_runtime.distributed.runtime_state import (
    get_runtime_state,
    initialize_runtime_state,
)
from xfuser_runtime.errors import InputError
from xfuser_runtime.pipelines import cfg, guiders
from xfuser_runtime.transformers.outputs import template_of


class Transformer:
    """Counts its calls; a list of samples gives a list, one tensor gives one tensor."""

    batch_processors = ()

    def __init__(self, foreign: object = None) -> None:
        self.samples = 0
        self.foreign = foreign

    def forward(self, x: Any, scale: torch.Tensor, as_object: bool = False) -> Any:
        self.samples += len(x)
        if isinstance(x, list):
            made = [sample * s for sample, s in zip(x, scale, strict=True)]
            return Transformer2DModelOutput(sample=made) if as_object else (made,)
        return (x * scale[:, None],)

    __call__ = forward

    def output_template(self, args: Any, kwargs: Any) -> Any:
        return template_of(Transformer().forward(*args, **kwargs))


def _session() -> None:
    config = ParallelConfig(use_cfg_parallel=True)
    initialize_runtime_state(EngineConfig(parallel_config=config))
    initialize_model_parallel(config)
    cfg.wrapped_transformer = lambda transformer: transformer  # type: ignore[assignment]
    cfg.whole_batch_processor = lambda transformer, names: transformer.foreign


def _lists(rank: int, as_object: bool, broken: bool) -> tuple[list[torch.Tensor], int]:
    _session()
    if broken:
        cfg._gather_batch = cfg._twice
    transformer = Transformer()
    call = cfg.batched_call(transformer, {"x": "items", "scale": 0}, 2)
    samples = [torch.full((3, 2), float(i)) for i in range(4)]
    output = call(samples, torch.tensor([1.0, 2.0, 3.0, 4.0]), as_object)[0]
    # Without guidance in this step there is nothing to halve.
    call(samples[:2], torch.tensor([1.0, 2.0]))
    return output, transformer.samples


@pytest.mark.parametrize("as_object", [False, True])
@pytest.mark.parametrize("broken", [False, True])
def test_lists_of_both_branches_are_cut_by_items(broken: bool, as_object: bool) -> None:
    expected = [torch.full((3, 2), i * (i + 1.0)) for i in range(4)]
    for output, samples in run_ranks(_lists, 2, as_object, broken):
        assert samples == 2 + 2
        assert len(output) == 4
        same = all(torch.equal(a, b) for a, b in zip(output, expected, strict=True))
        assert same is not broken


def _by_block(rank: int) -> dict[int, torch.Tensor]:
    _session()
    seen: dict[int, torch.Tensor] = {}

    class OfBlocks(Transformer):
        def forward(self, x: Any, samples: dict[int, torch.Tensor]) -> Any:
            seen.update(samples)
            return (x + samples[0] + samples[2],)

        __call__ = forward

    call = cfg.batched_call(OfBlocks(), {"x": 0, "samples.0": 0, "samples.2": 0}, 1)
    rows = torch.tensor([[1.0], [2.0]])
    (output,) = call(rows, {0: 10 * rows, 2: 100 * rows})
    assert torch.equal(output, 111 * rows)
    return seen


def test_keys_of_a_dict_that_are_numbers_stay_numbers() -> None:
    for rank, seen in enumerate(run_ranks(_by_block, 2)):
        assert {key: float(value) for key, value in seen.items()} == {
            0: 10.0 * (rank + 1),
            2: 100.0 * (rank + 1),
        }


def _with_helper(rank: int, guided: bool) -> tuple[torch.Tensor, int]:
    """A helper whose tokens are as many as the longest item that it sees."""
    _session()
    transformer = Transformer()

    class Helper(Transformer):
        def forward(self, x: list[torch.Tensor]) -> torch.Tensor:
            return torch.tensor([float(max(map(len, x)))] * len(x))

        __call__ = forward

    samples = [torch.ones(length) for length in ((3, 3, 5, 5) if guided else (5, 5))]
    control = cfg.helper_call(Helper(), {"x": "items"}, 2)(samples)
    call = cfg.batched_call(transformer, {"x": 0, "scale": 0}, 2)
    (output,) = call(torch.ones(len(samples), 1), control)
    return output, transformer.samples


@pytest.mark.parametrize("guided", [True, False])
def test_a_helper_sees_its_own_branch_alone(guided: bool) -> None:
    expected = torch.tensor([3.0, 3.0, 5.0, 5.0] if guided else [5.0, 5.0])
    for output, samples in run_ranks(_with_helper, 2, guided):
        assert torch.equal(output[:, 0], expected)
        assert samples == 2


def _with_foreign_processor(rank: int, split_before: bool) -> tuple[int, ...]:
    _session()
    counts = []
    for call in (_batched, _branches, _two_entries):
        transformer = Transformer(foreign=object())
        get_runtime_state().cfg_batch_is_split = split_before
        with pytest.warns(UserWarning, match="computes both branches"):
            call(transformer)
        counts.append(transformer.samples)
    return tuple(counts)


def _batched(transformer: Transformer) -> None:
    call = cfg.batched_call(transformer, {"x": 0, "scale": 0}, 1)
    call(torch.ones(2, 3), torch.ones(2))


def _branches(transformer: Transformer) -> None:
    for branch in range(2):
        cfg.branch_call(transformer, branch, True)(torch.ones(1, 3), torch.ones(1))


def _two_entries(transformer: Transformer) -> None:
    entries = [SimpleNamespace(), SimpleNamespace()]
    for entry in guiders.entries(entries, "noise_pred"):
        call = guiders.entry_call(transformer)
        entry.noise_pred = call(torch.ones(1, 3), torch.ones(1))[0]


def test_guidance_is_not_split_with_processors_that_were_not_measured() -> None:
    assert run_ranks(_with_foreign_processor, 2, False) == [(2, 2, 2)] * 2


def test_a_batch_that_is_split_already_admits_no_such_processor() -> None:
    with pytest.raises(RankError, match="not supported by xFuser with a batch"):
        run_ranks(_with_foreign_processor, 2, True)


def _pairs(rank: int) -> Any:
    _session()
    mine = (torch.full((2, 3), rank + 1.0), torch.full((1, 4), rank + 5.0))
    placeholder = tuple(torch.zeros_like(value) for value in mine)
    return cfg.exchange(*((mine, placeholder), (placeholder, mine))[rank])


def test_outputs_of_several_tensors_are_exchanged() -> None:
    for first, second in run_ranks(_pairs, 2):
        assert [float(value.mean()) for value in (*first, *second)] == [1, 5, 2, 6]


def _entries(rank: int, count: int, broken: bool) -> tuple[list[torch.Tensor], int]:
    _session()
    if broken:
        guiders.exchange = lambda first, second: (first, second)
    transformer = Transformer()
    entries = [SimpleNamespace(number=float(i + 1)) for i in range(count)]
    for entry in guiders.entries(entries, "noise_pred"):
        call = guiders.entry_call(transformer)
        entry.noise_pred = call(torch.ones(1, 3), torch.tensor([entry.number]))[0]
    return [entry.noise_pred for entry in entries], transformer.samples


@pytest.mark.parametrize(
    ("count", "calls", "broken"),
    [(1, 1, False), (2, 1, False), (3, 2, False), (2, 1, True)],
)
def test_each_rank_computes_its_entries(count: int, calls: int, broken: bool) -> None:
    expected = [torch.full((1, 3), i + 1.0) for i in range(count)]
    for outputs, samples in run_ranks(_entries, 2, count, broken):
        assert samples == calls
        same = all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
        assert same is not broken


@pytest.mark.parametrize("dim", [None, 1, 2])
def test_plain_guidance_splits(dim: int | None) -> None:
    guiders.check_guider(ClassifierFreeGuidance(), 8, dim)


@pytest.mark.parametrize(
    "guider",
    [AdaptiveProjectedMixGuidance(), ClassifierFreeGuidance(guidance_rescale=0.5)],
    ids=["momentum and norms", "rescaled"],
)
def test_formulas_over_whole_latents_admit_no_patches(guider: Any) -> None:
    guiders.check_guider(guider, 8, None)
    with pytest.raises(InputError, match="looks at all rows"):
        guiders.check_guider(guider, 8, 2)


def test_guiders_that_change_layers_are_refused() -> None:
    with pytest.raises(InputError, match="changes layers"):
        guiders.check_guider(SkipLayerGuidance(skip_layer_guidance_layers=[0]), 8, None)
