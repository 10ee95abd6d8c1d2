"""Where the loop's latents stand in what the denoiser takes."""

from __future__ import annotations

import torch

from porter.verify.window import Window, find_window


def test_a_run_at_either_end_is_found_by_its_values() -> None:
    sample, others = torch.randn(2, 6, 4), torch.randn(2, 3, 4)
    assert find_window(torch.cat([sample, others], 1), sample) == Window(1, 0, 6)
    assert find_window(torch.cat([others, sample], 1), sample) == Window(1, 3, 6)
    doubled = torch.cat([torch.cat([sample, others], 1)] * 2)
    window = find_window(doubled, sample)
    assert window is not None
    assert torch.equal(window.of(doubled)[:2], sample)


def test_other_values_and_other_shapes_have_no_window() -> None:
    sample = torch.randn(2, 6, 4)
    assert find_window(sample, sample) is None
    assert find_window(sample, None) is None
    assert find_window(torch.randn(2, 9, 4), sample) is None
    assert find_window(torch.randn(2, 9, 5), sample) is None
    assert find_window(sample[:, :4], sample) is None
