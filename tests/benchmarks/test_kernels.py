"""What the tables of kernels and of the exchange say."""

from __future__ import annotations

import pytest

from benchmarks.exchange import markdown
from benchmarks.kernels import gaps_between, kind_of, marked, table


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


def test_gaps_are_where_no_kernel_runs() -> None:
    assert gaps_between([(3, 6), (0, 4), (1, 2), (8, 9), (11, 12)]) == [2, 2]


def test_what_comes_before_the_first_step_ends_is_left_out() -> None:
    marks = [("spin_kernel", x, x + 1.0) for x in (1.0, 5.0, 9.0)]
    kernels = [("a", 0.0, 1.0), ("b", 2.0, 5.0), ("c", 6.0, 9.0), ("d", 10.0, 11.0)]
    assert marked([*kernels, *marks]) == kernels[1:3]


def test_a_step_in_a_table() -> None:
    kernels = [("triton_a", 0.0, 3000.0), ("nccl_b", 1500.0, 4500.0)]
    text = table([*kernels, ("nccl_b", 7500.0, 9000.0)])
    assert "| compiled kernels | 1.00 |" in text and "| messages | 1.50 |" in text
    assert "| nothing runs | 1.00 |" in text and "to the last | 3.00 |" in text
    assert "| of it in 0.3 gaps of 5 us or more | 1.00 |" in text
    assert "0.50 ms    0.7 x  nccl_b" not in text and "1.50 ms    0.7 x  nccl_b" in text


def test_the_exchange_in_a_table() -> None:
    text = markdown({"flux": {"alone": 240.4, "messages": 500.0}})
    assert text.splitlines()[-1] == "| flux | 240 | 500 |"
