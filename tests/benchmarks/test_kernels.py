"""What the tables of kernels and of the exchange say."""

from __future__ import annotations

import pytest

from benchmarks.exchange import markdown
from benchmarks.kernels import busy, kind_of, table


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage)", "messages"),
        ("void c10d::symmetric_memory::barrier_kernel(...)", "barriers"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNT", "matrix products"),
        ("void at::native::elementwise_kernel<direct_copy_kernel_cuda>", "copies"),
        ("triton_poi_fused_add_mul_3", "compiled kernels"),
        ("void at::native::vectorized_elementwise_kernel<4>", "other"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_kernels_side_by_side_count_once() -> None:
    assert busy([(0, 4), (1, 2), (3, 6), (8, 9)]) == 7


def test_a_step_in_a_table() -> None:
    kernels = [("triton_a", 0.0, 3000.0), ("nccl_b", 1500.0, 4500.0)]
    text = table([*kernels, ("nccl_b", 7500.0, 9000.0)])
    assert "| compiled kernels | 1.00 |" in text and "| messages | 1.50 |" in text
    assert "| nothing runs | 1.00 |" in text and "to the last | 3.00 |" in text


def test_the_exchange_in_a_table() -> None:
    text = markdown({"flux": {"alone": 240.4, "messages": 500.0}})
    assert text.splitlines()[-1] == "| flux | 240 | 500 |"
