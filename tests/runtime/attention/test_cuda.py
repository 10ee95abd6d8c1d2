"""The same problems on CUDA: every kernel on one GPU, every mode over NCCL on two or more.

fp64 runs in plain tensor operations, so only the exchange can be wrong; bf16 runs the kernels that
are used in earnest, held to the rounding of bf16.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing

from tests.runtime.attention.harness import (
    GATE,
    Problem,
    assembled,
    on_rank,
    reference,
    relative_error,
)
from tests.runtime.attention.test_cache import PROBLEMS as CACHED
from tests.runtime.attention.test_cache import simulated
from tests.runtime.attention.test_parity import PROBLEMS
from xfuser_runtime.attention import KVCache, backend_names
from xfuser_runtime.attention.backends import _BACKENDS, run_kernel
from xfuser_runtime.attention.kernels import KernelCall
from xfuser_runtime.config import ParallelConfig
from xfuser_runtime.distributed.parallel_state import (
    destroy_distributed_environment,
    init_distributed_environment,
    initialize_model_parallel,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BF16_GATE = 1e-2


# What packages warn of while they are imported is not this test's.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", backend_names())
@pytest.mark.parametrize("mask", [None, "bool", "additive", "dead", "smallest"])
@pytest.mark.parametrize("key_heads", [8, 2])
def test_kernels(name: str, mask: str | None, key_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, n, h, 64, generator=generator).cuda().bfloat16()
        for n, h in ((77, 8), (131, key_heads), (131, key_heads))
    )
    kept = torch.rand(2, 1, 1, 131, generator=generator).cuda() > 0.4
    if mask == "dead":
        kept[0] = False
    given = kept if mask in ("bool", "dead") else None
    if mask in ("additive", "smallest"):
        least = torch.finfo(torch.bfloat16).min if mask == "smallest" else float("-inf")
        given = torch.zeros_like(kept, dtype=torch.bfloat16).masked_fill(~kept, least)
    backend = _BACKENDS[name]
    call = KernelCall(query, key, value, given)
    reason = backend.reason_against(call, need_lse=backend.returns_lse)
    if reason is not None:
        pytest.skip(reason)
    out, lse = run_kernel(call, name=name, need_lse=backend.returns_lse)
    exact = KernelCall(query.double(), key.double(), value.double(), None)
    if given is not None:
        exact = replace(exact, mask=kept)
    expected, expected_lse = run_kernel(exact, name="sdpa_math", need_lse=True)
    gate = BF16_GATE if backend.exact else 10 * BF16_GATE
    if mask != "dead" or backend.returns_lse:
        assert relative_error(out, expected) <= gate
    if lse is not None:
        assert expected_lse is not None
        assert torch.equal(lse.isinf(), expected_lse.isinf())
        finite = expected_lse.isfinite()
        assert (lse[finite] - expected_lse[finite]).abs().max() <= 5 * gate


@pytest.mark.parametrize("name", backend_names())
def test_rows_masked_with_the_smallest_number_have_keys(name: str) -> None:
    """Of such a block's weight nothing is left in a merge; of none the kernels say 0."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, rows, 4, 64, generator=generator).cuda().bfloat16()
        for rows in (40, 48, 48)
    )
    mask = torch.zeros(1, 1, 40, 48, dtype=torch.bfloat16, device="cuda")
    mask[:, :, :10] = torch.finfo(torch.bfloat16).min
    call = KernelCall(query, key, value, mask)
    if reason := _BACKENDS[name].reason_against(call, need_lse=True):
        pytest.skip(reason)
    _, lse = run_kernel(call, name=name, need_lse=True)
    assert lse is not None
    masked, others = lse[..., :10], lse[..., 10:]
    assert masked.isfinite().all() and (masked < -1e38).all()
    assert (others.abs() < 100).all()


def _on_gpus(rank: int, mode: tuple[int, int], dtype: torch.dtype, folder: str) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    init_distributed_environment(
        rank, mode[0] * mode[1], init_method=f"file://{folder}/store"
    )
    initialize_model_parallel(
        ParallelConfig(ulysses_degree=mode[0], ring_degree=mode[1])
    )
    found: dict[str, list[torch.Tensor]] = {}
    for seed, (name, problem) in enumerate(_problems(dtype).items()):
        found[name] = [on_rank(problem, seed, device="cuda").cpu()]
    for name, (problem, schedule) in CACHED.items():
        cache, problem = KVCache(), _typed(problem, dtype)
        found[f"cached {name}"] = [
            on_rank(problem, seed, patch, cache, device="cuda").cpu()
            for seed, patch in schedule
        ]
    torch.save(found, Path(folder) / f"{rank}.pt")
    destroy_distributed_environment()


def _typed(problem: Problem, dtype: torch.dtype) -> Problem:
    return replace(problem, dtype=dtype, backend=None)


def _problems(dtype: torch.dtype) -> dict[str, Problem]:
    return {name: _typed(problem, dtype) for name, problem in PROBLEMS.items()}


MODES = [(2, 1), (1, 2), (4, 1), (1, 4), (2, 2)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("mode", MODES, ids=lambda m: f"ulysses{m[0]} x ring{m[1]}")
def test_modes_over_nccl(mode: tuple[int, int], dtype: torch.dtype) -> None:
    ranks = mode[0] * mode[1]
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_on_gpus, (mode, dtype, folder), nprocs=ranks)
        results = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]
    gate = BF16_GATE if dtype == torch.bfloat16 else GATE[dtype]
    too_large = {}
    for seed, (name, problem) in enumerate(_problems(dtype).items()):
        if problem.mask == "key_dead" and mode[1] == 1:
            continue  # torch's kernels on CUDA disagree with each other about such rows
        whole = assembled(problem, [result[name][0] for result in results])
        error = relative_error(whole, reference(_exact(problem), seed))
        if not error <= gate:
            too_large[name] = error
    for name, (problem, schedule) in CACHED.items():
        problem = _typed(problem, dtype)
        expected = simulated(_exact(problem), schedule)
        for i, (_, patch) in enumerate(schedule):
            rows = [result[f"cached {name}"][i] for result in results]
            error = relative_error(assembled(problem, rows, patch), expected[i])
            if not error <= gate:
                too_large[f"cached {name}, pass {i}"] = error
    assert not too_large


def _exact(problem: Problem) -> Problem:
    return replace(problem, dtype=torch.float64)
