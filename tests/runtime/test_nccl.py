"""Groups, collectives, channels and the end of a failed job over NCCL, on two GPUs."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.torchrun import torchrun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

START = """
import time, torch, torch.distributed as dist
from xfuser_runtime.config import EngineConfig, ParallelConfig
from xfuser_runtime.distributed import *
from xfuser_runtime.distributed.collectives import *
from xfuser_runtime.distributed.launch import fail_together, prepare_environment

def start(**degrees):
    prepare_environment(EngineConfig(ParallelConfig(**degrees)))
    return get_world_group().rank_in_group
"""

COLLECTIVES = """
with fail_together():
    rank = start(ulysses_degree=2)
    group = get_sp_group()
    whole = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0)).cuda()
    own = whole[:, :5] if rank == 0 else whole[:, 5:]
    assert torch.equal(all_gather(own, 1, (5, 2), group), whole)
    received = all_to_all(
        [[whole[:, :1] + rank], [whole[:, 1:] + rank]], [[(2, 1 + 5 * rank, 3)]] * 2, group
    )
    rows = whole[:, :1] if rank == 0 else whole[:, 1:]
    assert torch.equal(torch.cat([piece for (piece,) in received]), torch.cat([rows, rows + 1]))
    assert broadcast_object({"rank": rank}, group, 1) == {"rank": 1}
    assert all_reduce_max(torch.tensor(float(rank), device="cuda"), group).item() == 1
    assert broadcast_object([torch.get_rng_state()], group, 0)[0].device.type == "cpu"

    # Captured in a CUDA graph, as the hot path is.
    source = own.clone()
    graph = torch.cuda.CUDAGraph()
    all_gather(source, 1, (5, 2), group)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = all_gather(source, 1, (5, 2), group)
    source.add_(1)
    graph.replay()
    assert torch.equal(captured, whole + 1)
print("fine")
"""

CHANNELS = """
with fail_together():
    rank = start(pipefusion_parallel_degree=2)
    forward = P2PChannel(get_pp_group())
    feedback = P2PChannel(get_pp_group(), feedback=True)
    size = 1 << 24
    for step in range(3):
        # Four patches in flight: the first stage sends all before it takes any back.
        if rank == 0:
            for patch in range(4):
                forward.send(torch.full((size,), float(patch), device="cuda"), 1)
            for patch in range(4):
                x = feedback.recv(torch.empty(size, device="cuda"), 1)
                assert (x == 2 * patch).all()
        else:
            for patch in range(4):
                x = forward.recv(torch.empty(size, device="cuda"), 0)
                feedback.send(x * 2, 0)
    forward.wait()
    feedback.wait()
    torch.cuda.synchronize()
print("fine")
"""

FAILURE = """
with fail_together():
    rank = start(pipefusion_parallel_degree=2)
    dist.all_reduce(torch.zeros(1, device="cuda"))
    if rank == 1:
        raise ValueError("boom")
    dist.all_reduce(torch.zeros(1, device="cuda"))
    torch.cuda.synchronize()
"""


def _run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = folder / "job.py"
    path.write_text(START + script)
    return torchrun(str(path), timeout=200)


@pytest.mark.parametrize(
    "script", [COLLECTIVES, CHANNELS], ids=["collectives", "channels"]
)
def test_over_nccl(script: str, tmp_path: Path) -> None:
    done = _run(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fine") == 2


def test_a_rank_that_raises_ends_the_one_that_waits_in_nccl(tmp_path: Path) -> None:
    begin = time.monotonic()
    done = _run(FAILURE, tmp_path)
    assert done.returncode != 0
    assert (
        "error: rank 1 (stage 1 of 2, outside the denoising loop): ValueError: boom"
        in done.stderr
    )
    assert time.monotonic() - begin < 60
