"""Loading by stage: a rank reads and holds its own blocks, and computes what stock does."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.integration.workshop import (
    BATCHED,
    CAUGHT,
    GATE,
    JOINT,
    MODES,
    PIXART,
    Workshop,
    arguments,
    distance,
    engine,
    latents,
    only,
)
from tests.ranks import run_ranks
from xfuser_runtime.config import EngineConfig, ParallelConfig
from xfuser_runtime.memory import bytes_of, bytes_of_blocks
from xfuser_runtime.pipelines.loading import own_components
from xfuser_runtime.proofs import UnprovenWarning

WEIGHTS = "diffusion_pytorch_model.safetensors"


def saved(workshop: Workshop, name: str, folder: Path, **options: Any) -> Any:
    """The stock pipeline, saved to `folder`, and its latents."""
    workshop.wrapper(name)
    pipeline = workshop.stock(name)
    pipeline.save_pretrained(folder, **options)
    return pipeline, latents(pipeline(**arguments(pipeline)))


def run_from(
    workshop: Workshop, name: str, folder: Path, mode: str, **options: Any
) -> list[Any]:
    """Latents and bytes of each rank that loads `folder` itself."""
    cls = workshop.wrapper(name)

    def rank_main(rank: int) -> Any:
        warnings.simplefilter("ignore", UnprovenWarning)
        source = folder / str(rank) if (folder / str(rank)).is_dir() else folder
        pipeline = cls.from_pretrained(source, engine(MODES[mode]), **options)
        pipeline.set_progress_bar_config(disable=True)
        output = pipeline(**arguments(pipeline))
        return (
            None if output is None else latents(output),
            bytes_of(pipeline.transformer),
            bytes_of_blocks(pipeline.transformer),
        )

    return run_ranks(rank_main, 2)


@pytest.mark.parametrize("mode", ["pp2", "pipefusion"])
@pytest.mark.parametrize("name", [PIXART, JOINT])
def test_each_stage_holds_its_own_blocks(
    name: str, mode: str, workshop: Workshop, tmp_path: Path
) -> None:
    stock, expected = saved(workshop, name, tmp_path)
    found = run_from(workshop, name, tmp_path, mode)
    if mode == "pp2":
        assert distance(only([latent for latent, _, _ in found]), expected) <= GATE
    blocks = [held for _, _, held in found]
    whole = bytes_of(stock.transformer)
    loops = workshop.wrapper(
        name
    )  # the wrapper of its transformer is registered by now
    assert loops is not None
    all_blocks = sum(blocks)
    assert all(0.4 * all_blocks <= held <= 0.6 * all_blocks for held in blocks)
    # What is outside of the blocks is on both.
    assert all(held == whole - all_blocks + own for (_, held, own) in found)


def test_other_stages_blocks_are_not_read(workshop: Workshop, tmp_path: Path) -> None:
    """A checkpoint without another stage's blocks is enough; without its own it is not."""
    _, expected = saved(workshop, PIXART, tmp_path / "0")
    saved(workshop, PIXART, tmp_path / "1")
    for rank in (0, 1):
        path = tmp_path / str(rank) / "transformer" / WEIGHTS
        kept = {
            key: value
            for key, value in load_file(path).items()
            if not key.startswith(foreign_blocks(rank))
        }
        save_file(kept, path, metadata={"format": "pt"})
    found = run_from(workshop, PIXART, tmp_path, "pp2")
    assert distance(only([latent for latent, _, _ in found]), expected) <= GATE


def test_the_right_blocks_are_read(workshop: Workshop, tmp_path: Path) -> None:
    """The sabotage twin: a stage whose file has its own blocks exchanged is far off."""
    _, expected = saved(workshop, PIXART, tmp_path)
    path = tmp_path / "transformer" / WEIGHTS
    held = load_file(path)
    first, last = "transformer_blocks.0.", "transformer_blocks.3."
    swapped = {
        (
            key.replace(first, last)
            if key.startswith(first)
            else key.replace(last, first) if key.startswith(last) else key
        ): value
        for key, value in held.items()
    }
    save_file(swapped, path, metadata={"format": "pt"})
    found = run_from(workshop, PIXART, tmp_path, "pp2")
    assert distance(only([latent for latent, _, _ in found]), expected) > CAUGHT


def test_shards_and_data_types(workshop: Workshop, tmp_path: Path) -> None:
    stock, _ = saved(workshop, BATCHED, tmp_path, max_shard_size="20KB")
    index = tmp_path / "transformer" / f"{WEIGHTS}.index.json"
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 1
    whole = bytes_of(stock.transformer)
    found = run_from(workshop, BATCHED, tmp_path, "pp2", torch_dtype=torch.bfloat16)
    assert all(held < 0.5 * whole for _, held, _ in found)


def test_a_whole_load_says_why(
    workshop: Workshop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig(ParallelConfig(pipefusion_parallel_degree=2), world_size=2)
    options = {"device_map": "balanced"}
    assert own_components(None, tmp_path, config, options) == options
    assert "device_map is set" in caplog.text
    assert own_components(None, "some/hub-name", config, {}) == {}
    assert "some/hub-name is no folder" in caplog.text


def foreign_blocks(rank: int) -> tuple[str, ...]:
    """Prefixes of the keys of the blocks that a rank of two does not run, of four."""
    indices = (2, 3) if rank == 0 else (0, 1)
    return tuple(f"transformer_blocks.{index}." for index in indices)
