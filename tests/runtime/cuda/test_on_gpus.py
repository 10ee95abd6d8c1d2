"""A compiled block on two GPUs that share memory: stacked projections, attention beside products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.torchrun import check_fine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

SCRIPT = """
import sys, torch, torch.nn.functional as F
from torch import nn
from xfuser_runtime.config import EngineConfig, ParallelConfig
from xfuser_runtime.cuda import passes, stacked, symmetric
from xfuser_runtime.cuda.copy_engines import copy_rows
from xfuser_runtime.cuda.ways import WAYS
from xfuser_runtime.distributed import get_world_group
from xfuser_runtime.distributed.launch import fail_together, prepare_environment

C, H, ROWS = 512, 8, 640

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(C, C) for _ in range(3))
        self.up, self.out = nn.Linear(C, 4 * C), nn.Linear(5 * C, C)

    def forward(self, x, attend):
        q, k, v = (f(x).unflatten(-1, (H, -1)) for f in (self.to_q, self.to_k, self.to_v))
        q, k = F.rms_norm(q, (C // H,)), F.rms_norm(k, (C // H,))
        hidden = F.gelu(self.up(x))
        return x + self.out(torch.cat([attend(q, k, v).flatten(2), hidden], -1))

def whole(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

def exchanged(q, k, v):
    return symmetric.attention(
        q, k, v, query_lengths=[ROWS] * 2, key_lengths=[ROWS] * 2, is_causal=False, scale=None
    )

with fail_together(), torch.no_grad():
    prepare_environment(EngineConfig(ParallelConfig(ulysses_degree=2)))
    rank = get_world_group().rank_in_group
    torch.manual_seed(0)
    block = Block().cuda().bfloat16()
    x = torch.randn(2, 2 * ROWS, C).cuda().bfloat16()
    expected = block(x, whole)[:, rank * ROWS : (rank + 1) * ROWS]
    own = x[:, rank * ROWS : (rank + 1) * ROWS].contiguous()
    stacked.lay_out(block)
    compiled = torch.compile(block, options=passes.OPTIONS, fullgraph=True)
    for way in (None, *WAYS):
        symmetric.WAY = way
        for _ in range(3):
            found = compiled(own, exchanged)
        error = (found - expected).norm() / expected.norm()
        assert error < 1e-2, (way, error)
        static = own.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            captured = compiled(static, exchanged)
        for turn in range(4):
            graph.replay()
        error = (captured - expected).norm() / expected.norm()
        assert error < 1e-2, (way, error)
        static.neg_()
        graph.replay()
        assert (captured - expected).norm() > 1e-1 * expected.norm()
        del graph
    # Engines copy rows at a pitch, on one device and to another.
    source = torch.randn(2, 7, 4, 8, device="cuda")
    target = torch.zeros(2, 7, 2, 8, device="cuda")
    assert copy_rows(target, source[:, :, 2:])
    assert torch.equal(target, source[:, :, 2:])
    assert not copy_rows(target.transpose(2, 3), source[:, :, 2:].transpose(2, 3))
print("fine")
"""


def test_a_compiled_block(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    check_fine(str(script))
