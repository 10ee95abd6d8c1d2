"""What parallel attention refuses, and the integer and mask helpers under it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.ranks import RankError, run_ranks
from tests.runtime.attention.harness import (
    GATE,
    Problem,
    assembled,
    errors,
    on_rank,
    reference,
    relative_error,
)
from xfuser_runtime.attention import (
    AttentionPlan,
    KVCache,
    backend_names,
    check_backend_name,
    parallel_attention,
)
from xfuser_runtime.attention.backends import from_diffusers_name, run_kernel
from xfuser_runtime.attention.kernels import KernelCall, is_importable
from xfuser_runtime.attention.keys import split_mask
from xfuser_runtime.attention.ulysses import split_heads
from xfuser_runtime.config import ParallelConfig
from xfuser_runtime.distributed.parallel_state import initialize_model_parallel

CAUSAL = Problem(segments=(("image", 13),), queries=("image",), keys=("image",))


def test_causal_runs_where_the_order_is_the_sequences() -> None:
    problem = replace(CAUSAL, is_causal=True)
    assert errors(2, 1, {"causal": problem})["causal"] <= GATE[torch.float32]
    found = on_rank(problem, 0)
    assert relative_error(found, reference(problem, 0)) <= GATE[torch.float32]


@pytest.mark.parametrize(
    ("mode", "problem"),
    [
        ((1, 2), CAUSAL),
        ((2, 1), Problem()),
        ((2, 1), replace(CAUSAL, patches=2)),
    ],
    ids=["ring", "two segments", "patches"],
)
def test_causal_is_refused_elsewhere(mode: tuple[int, int], problem: Problem) -> None:
    with pytest.raises(RankError, match="is_causal on sharded tokens"):
        errors(*mode, {"causal": replace(problem, is_causal=True)})


def test_causal_over_a_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="is_causal on sharded tokens"):
        on_rank(replace(CAUSAL, patches=2, is_causal=True), 0, 0, KVCache())


def test_causal_with_a_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="is_causal together with a mask"):
        on_rank(replace(CAUSAL, is_causal=True, mask="key_bool"), 0)


def test_one_rank_is_torchs_call() -> None:
    for problem in (Problem(mask="square_bool"), Problem(heads=6, key_heads=2)):
        found = assembled(problem, [on_rank(problem, 3)])
        assert torch.equal(found, reference(problem, 3))


def _call(**changes: object) -> torch.Tensor:
    x = torch.randn(1, 6, 4, 8)
    given: dict[str, object] = {"query": x, "key": x, "value": x, "attn_mask": None}
    plan = {"patch": None, "layout": CAUSAL.layout(1), "cache": None}
    layout = Problem(segments=(("image", 6),)).layout(1)
    plan["layout"] = layout
    plan |= {k: v for k, v in changes.items() if k in plan}
    given |= {k: v for k, v in changes.items() if k in given}
    query, key, value = (given[name] for name in ("query", "key", "value"))
    return parallel_attention(
        query,  # type: ignore[arg-type]
        key,  # type: ignore[arg-type]
        value,  # type: ignore[arg-type]
        attn_mask=given["attn_mask"],  # type: ignore[arg-type]
        plan=AttentionPlan(
            query_segments=("image",),
            key_segments=("image",),
            **plan,  # type: ignore[arg-type]
        ),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.randn(1, 5, 4, 8)}, "5 query rows on shard 0, expected 6"),
        ({"key": torch.randn(1, 7, 4, 8)}, "7 key rows on shard 0, expected 6"),
        ({"key": torch.randn(1, 6, 2, 8)}, "4 query heads and 2 key heads"),
        ({"query": torch.randn(1, 6, 4, 8).double()}, "expected one type"),
        ({"patch": 0}, "without a key/value cache"),
        (
            {"layout": Problem(segments=(("image", 6),)).layout(2)},
            "a layout of 2 shards on 1",
        ),
        (
            {"attn_mask": torch.ones(1, 1, 1, 5).bool(), "cache": KVCache()},
            r"a mask of shape \(1, 1, 1, 5\), expected",
        ),
    ],
)
def test_what_does_not_fit_the_plan(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _call(**changes)


def test_a_mask_of_unequal_rows_over_local_keys_is_refused() -> None:
    """It would say nothing of the other ranks' keys."""

    def body(rank: int) -> None:
        initialize_model_parallel(ParallelConfig(ulysses_degree=2))
        layout = Problem(segments=(("image", 6),)).layout(2)
        x = torch.randn(1, 3, 4, 8)
        parallel_attention(
            x,
            x,
            x,
            attn_mask=torch.rand(1, 1, 3, 3) > 0.5,
            plan=AttentionPlan(layout, ("image",), ("image",)),
        )

    with pytest.raises(RankError, match="a mask of shape"):
        run_ranks(body, 2)


def test_all_keys_on_one_rank_is_decided_alike() -> None:
    """There a mask over all keys and one over local keys look the same to one rank."""
    mask = torch.rand(2, 1, 1, 4) > 0.5
    holder = split_mask(mask, query_rows=2, key_lengths=(4, 0), key_rows=4, all_keys=4)
    other = split_mask(mask, query_rows=2, key_lengths=(4, 0), key_rows=0, all_keys=4)
    assert holder.keys is not None and holder.keys.shape == (2, 1, 1, 4)
    assert other.keys is not None and other.keys.shape == (2, 1, 1, 0)


def test_an_expanded_mask_without_rows_is_refused() -> None:
    """What it says of the keys is not in it any more."""
    mask = torch.ones(1, 1, 1, 3).bool().expand(-1, -1, 0, -1)
    with pytest.raises(ValueError, match="a mask of shape"):
        split_mask(mask, query_rows=0, key_lengths=(3, 3), key_rows=3, all_keys=6)


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (6, 3), (8, 4), (10, 1)])
def test_every_query_head_finds_its_key_head(
    heads: tuple[int, int], degree: int
) -> None:
    query_heads, key_heads = heads
    split = split_heads(query_heads, key_heads, degree)
    group = query_heads // key_heads
    seen = []
    for rank in range(degree):
        (start, stop), (first, last) = split.query[rank], split.key[rank]
        picked = split.key_head_of_query_heads(rank)
        for local in range(stop - start):
            if picked is None:
                key_head = first + local // ((stop - start) // (last - first))
            else:
                key_head = first + picked[local]
            assert first <= key_head < last
            assert key_head == (start + local) // group
            seen.append(start + local)
    assert seen == list(range(query_heads))
    sizes = [stop - start for start, stop in split.query]
    assert max(sizes) - min(sizes) <= 1


class TestKernels:
    def test_unknown_name_lists_the_names(self) -> None:
        with pytest.raises(
            ValueError, match="'fast', expected one of: sdpa, sdpa_math"
        ):
            check_backend_name("fast")
        check_backend_name(None)
        check_backend_name("sdpa")

    def test_a_kernel_that_is_not_installed(self) -> None:
        with pytest.raises(ValueError, match="needs the package flash_attn_interface"):
            check_backend_name("flash_3")

    @pytest.mark.parametrize(
        ("package", "found"),
        [("torch.nn", True), ("torch.none", False), ("nowhere.at_all", False)],
    )
    def test_whether_a_package_is_installed(self, package: str, found: bool) -> None:
        """Also in compiled code, where no exception may pass."""
        check = torch.compile(
            lambda x: x + is_importable(package), backend="eager", fullgraph=True
        )
        assert is_importable(package) == found
        assert check(torch.zeros(1)).item() == found

    def test_a_named_kernel_that_cannot_take_the_call(self) -> None:
        x = torch.randn(1, 3, 2, 8)
        with pytest.raises(
            ValueError,
            match="'sdpa_flash' cannot run: the tensors are on cpu; choose one",
        ):
            run_kernel(KernelCall(x, x, x), name="sdpa_flash")
        with pytest.raises(ValueError, match="ring attention needs the log-sum-exp"):
            run_kernel(KernelCall(x, x, x), name="sdpa", need_lse=True)

    def test_diffusers_names(self) -> None:
        assert from_diffusers_name("native") is None
        assert from_diffusers_name("_native_math") == "sdpa_math"
        with pytest.raises(ValueError, match="'flex' under parallel attention"):
            from_diffusers_name("flex")

    @pytest.mark.parametrize("name", ["sdpa", "sdpa_math", "sdpa_cpu"])
    @pytest.mark.parametrize("mask", [None, "bool", "additive", "dead"])
    def test_output_and_log_sum_exp(self, name: str, mask: str | None) -> None:
        generator = torch.Generator().manual_seed(0)
        query, key, value = (
            torch.randn(2, n, h, 8, generator=generator, dtype=torch.float64)
            for n, h in ((5, 4), (7, 2), (7, 2))
        )
        kept = torch.rand(2, 1, 5, 7, generator=generator) > 0.4
        if mask == "dead":
            kept[0, :, 2] = False
        given = {
            None: None,
            "additive": torch.zeros(kept.shape, dtype=torch.float64).masked_fill(
                ~kept, float("-inf")
            ),
        }.get(mask, kept)
        need_lse = name != "sdpa"
        call = KernelCall(query, key, value, given, scale=0.3)
        out, lse = run_kernel(call, name=name, need_lse=need_lse)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        expected = F.scaled_dot_product_attention(
            q, k, v, attn_mask=given, scale=0.3, enable_gqa=True
        )
        assert torch.allclose(out.transpose(1, 2), expected, atol=1e-12, rtol=0)
        if need_lse:
            scores = 0.3 * q @ k.repeat_interleave(2, 1).mT
            if mask is not None:
                scores = scores.masked_fill(~kept, float("-inf"))
            assert lse is not None
            assert torch.allclose(lse, scores.logsumexp(-1), atol=1e-12, rtol=0)

    def test_without_keys(self) -> None:
        x = torch.randn(1, 3, 2, 8)
        out, lse = run_kernel(KernelCall(x, x[:, :0], x[:, :0]), need_lse=True)
        assert lse is not None
        assert not out.any() and (lse == float("-inf")).all()

    def test_names_are_public(self) -> None:
        assert {"sdpa", "flash", "flash_3", "sage"} <= set(backend_names())
