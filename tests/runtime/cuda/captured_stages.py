"""Ports whose transformer is in two stages: captured calls against calls as they are.

    torchrun --nproc_per_node=2 -m tests.runtime.cuda.captured_stages FOLDER NAME ...

Of each port a tiny pipeline runs in whole passes alone, another in passes over patches. Each is
called several times as it is and as many with captured calls, which must return the same to the
gate. The last rank prints a line for each. Without CUDA the captures are played.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch

from porter.shrink import call_kwargs, make_pipeline
from tests.runtime.cuda import played
from xfuser_runtime import load_pipeline_class, xFuserArgs
from xfuser_runtime.distributed import get_runtime_state, get_world_group
from xfuser_runtime.distributed.launch import fail_together
from xfuser_runtime.loader import load_upstream_class
from xfuser_runtime.transformers import base_transformer

STEPS = 5
#: Relative L2: the kernels are the same, but those of a graph may split their sums otherwise.
GATE = 1e-4
#: Seed and set of prompts of each call: the sets differ in their numbers of tokens.
CALLS = ((0, 0), (1, 0), (2, 1), (3, 1), (1, 0))


def main(folder: str, names: list[str]) -> None:
    """Compare each of the named ports in a folder; raises where some differ."""
    if not torch.cuda.is_available():
        base_transformer.run_call = played.run_call  # type: ignore[assignment]
    wrong = [
        f"{name}, {patches} patches"
        for name in names
        for patches in (1, 2)
        if not _is_fine(folder, name, patches)
    ]
    assert not wrong, wrong
    print("fine", flush=True)


def _is_fine(folder: str, name: str, patches: int) -> bool:
    config, _ = xFuserArgs(
        pipefusion_parallel_degree=2,
        num_pipeline_patch=patches,
        warmup_steps=1 if patches > 1 else STEPS,
        num_inference_steps=STEPS,
        allow_unproven=True,
    ).create_config()
    stock = make_pipeline(load_upstream_class(name))
    stock.to("cuda" if torch.cuda.is_available() else "cpu")
    stock.set_progress_bar_config(disable=True)
    cls: Any = load_pipeline_class(name, generated=folder)
    pipeline = cls(stock, config)
    kwargs = [call_kwargs(stock, num_inference_steps=STEPS, text=n) for n in (0, 1)]
    expected, found = (
        [_call(pipeline, kwargs[text], seed, captured) for seed, text in CALLS]
        for captured in (False, True)
    )
    replayer = vars(stock.transformer)["_xfuser_wrapping"].replayer
    is_captured = replayer.replays > 0 and not replayer.reasons
    if get_world_group().rank_in_group == 0:
        return is_captured
    error = max(map(_difference, found, expected))
    other_seed = _difference(expected[1], expected[0])
    print(
        f"{name}, {patches} patches: {error:.1e} (another seed: {other_seed:.1e}), "
        f"{replayer.replays} replays, captured in {replayer.capture_seconds:.1f} s, "
        f"{replayer.reasons}",
        flush=True,
    )
    return is_captured and error < GATE < other_seed


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _call(pipeline: Any, kwargs: Any, seed: int, captured: bool) -> Any:
    state = get_runtime_state()
    options = replace(state.runtime_config, use_cuda_graph=captured)
    state.engine_config = replace(state.engine_config, runtime_config=options)
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        out = pipeline(**{**kwargs, "generator": generator, "output_type": "latent"})
    return None if out is None else out[0].float().cpu()


if __name__ == "__main__":
    with fail_together():
        main(sys.argv[1], sys.argv[2:])
