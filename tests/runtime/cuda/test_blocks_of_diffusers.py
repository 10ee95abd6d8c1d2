"""Blocks of diffusers with the operations that GPUs get, in tiny models of every kind of code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from porter.probe.capture import copied, first_step_calls
from porter.probe.stock import upstream_runs
from porter.shrink import call_kwargs, make_checkpoint
from tests.runtime.cuda.rewritten import kernels_in, names, rewritten
from xfuser_runtime.cuda import products

EXPECTED = {
    # Joined streams, of two kinds of blocks.
    ("FluxPipeline", "transformer_blocks"): {
        *("gelu_product", "modulated_norm", "rotated_heads"),
        "modulated_norm_of_exact_sum",
    },
    ("FluxPipeline", "single_transformer_blocks"): {
        *("gelu_product", "joined_product", "modulated_norm", "rotated_heads"),
    },
    # Quotients by one, sums without a gate.
    ("PixArtAlphaPipeline", "transformer_blocks"): {
        *("gelu_product", "modulated_norm", "modulated_norm_of_exact_sum"),
    },
    # Heads before tokens.
    ("CogVideoXPipeline", "transformer_blocks"): {"gelu_product", "rotated_heads"},
    # Rotary embeddings that are written in place.
    ("LTX2Pipeline", "transformer_blocks"): {"gelu_product"},
    # Experts that are filled in place.
    ("NucleusMoEImagePipeline", "transformer_blocks"): {"joined_product"},
}


@pytest.mark.parametrize("for_compiler", [True, False])
@pytest.mark.parametrize(("name", "blocks"), EXPECTED)
def test_the_same_result(
    name: str,
    blocks: str,
    for_compiler: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "MIN_ROWS", 1)
    monkeypatch.setattr(products, "MIN_COLUMNS", 1)
    pipeline_class = getattr(diffusers, name)
    with upstream_runs(pipeline_class):
        make_checkpoint(pipeline_class, tmp_path)
        pipeline = pipeline_class.from_pretrained(tmp_path)
        kwargs = call_kwargs(pipeline, num_inference_steps=2)
        calls = first_step_calls(pipeline, kwargs, ["transformer"])
    call = next(call for call in calls if call.component == "transformer")
    found: list[Any] = []

    def checked(block: Any) -> Any:
        made, calls = rewritten(
            block.forward, fullgraph=False, for_compiler=for_compiler
        )

        def run(*args: Any, **kwargs: Any) -> Any:
            expected = block.__class__.forward(block, *args, **copied(kwargs))
            out = made(*args, **copied(kwargs))
            torch.testing.assert_close(out, expected)
            found.extend(kernels_in(calls))
            return expected

        return run

    for block in getattr(pipeline.transformer, blocks):
        block.forward = checked(block)
    with torch.no_grad():
        pipeline.transformer(**copied(call.arguments))
    expected = EXPECTED[name, blocks]
    if not for_compiler:
        expected = {x.replace("exact_sum", "sum") for x in expected}
    assert set(names(found)) == expected
