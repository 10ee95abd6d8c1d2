"""Wrong calls end in one clear line on all ranks: no hang, no traceback, no file."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDPMScheduler

from porter.generate import plan
from porter.shrink import make_checkpoint
from tests.integration.workshop import (
    JOINT,
    MODES,
    PIXART,
    Workshop,
    arguments,
    engine,
)
from tests.ranks import RankError, run_ranks
from xfuser_runtime import run
from xfuser_runtime.loader import load_upstream_class

PATCHES: dict[str, Any] = {**MODES["pipefusion"], "num_pipeline_patch": 4}


@pytest.mark.parametrize("name", [PIXART, JOINT])
@pytest.mark.parametrize("mode", MODES)
def test_no_prompt_at_all(workshop: Workshop, mode: str, name: str) -> None:
    def body(rank: int, pipe: Any) -> None:
        made = arguments(pipe)
        pipe(**{**made, "prompt": None})

    with pytest.raises(RankError, match="Cannot leave both|Provide either") as raised:
        workshop.run(name, mode, body)
    assert len(raised.value.failures) == 2, "a rank waited for the other"


@pytest.mark.parametrize("mode", MODES)
def test_a_height_that_does_not_divide(workshop: Workshop, mode: str) -> None:
    """By the VAE's factor, which upstream checks; by the patches, which it does not."""

    def body(rank: int, pipe: Any) -> list[str]:
        lines = []
        for height in (130, 136):
            with pytest.raises(ValueError) as raised:
                pipe(**arguments(pipe, height=height, batch_size=2))
            lines.append(str(raised.value))
        return lines

    for by_vae, by_patch in workshop.run(PIXART, mode, body):
        assert "have to be divisible by" in by_vae
        assert by_patch.count("\n") == 0 and ", expected " in by_patch


def test_more_patches_than_rows(workshop: Workshop) -> None:
    def body(rank: int, pipe: Any) -> None:
        pipe(**arguments(pipe, height=48, width=128))

    with pytest.raises(RankError, match="4 patches") as raised:
        workshop.run(PIXART, PATCHES, body)
    assert ", expected " in str(raised.value) and ";" in str(raised.value)


def test_more_stages_than_blocks(workshop: Workshop) -> None:
    def shorten(rank: int, pipe: Any) -> None:
        del pipe.transformer.transformer_blocks[1:]

    with pytest.raises(RankError, match="2 pipeline stages for 1 transformer blocks"):
        workshop.run(PIXART, "pp2", lambda rank, pipe: None, before=shorten)


def test_a_scheduler_that_looks_at_whole_latents(workshop: Workshop) -> None:
    def body(rank: int, pipe: Any) -> None:
        pipe.scheduler = DDPMScheduler(thresholding=True)
        pipe(**arguments(pipe))

    with pytest.raises(RankError, match="Scheduler DDPMScheduler is not supported by"):
        workshop.run(PIXART, "pipefusion", body)


def test_an_unknown_attention_backend(workshop: Workshop) -> None:
    flags = {"ulysses_degree": 2, "attention_backend": "fox"}
    with pytest.raises(RankError, match="attention_backend 'fox', expected one of"):
        workshop.run(PIXART, flags, lambda rank, pipe: None)


def test_a_pipeline_of_another_class(workshop: Workshop) -> None:
    other = workshop.wrapper(JOINT)

    def body(rank: int, pipe: Any) -> None:
        other(pipe, engine({"ulysses_degree": 2}))

    with pytest.raises(
        RankError, match="a pipeline of class PixArtAlphaPipeline, expe"
    ):
        workshop.run(PIXART, {"ulysses_degree": 2}, body, wrap=False)


# -- the same through the command line -------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ports, a checkpoint, and one whose transformer has a single block."""
    folder = tmp_path_factory.mktemp("checkpoints")
    cls = load_upstream_class(PIXART)
    make_checkpoint(cls, folder / "good")
    make_checkpoint(cls, folder / "short", overrides={"transformer": {"num_layers": 1}})
    generated = folder / "generated"
    made = plan([PIXART], generated)
    proofs: dict[str, dict[str, Any]] = {"pp": {}, "pipefusion": {}, "ulysses": {}}
    lock = made.lock.with_proofs(PIXART, proofs)
    dataclasses.replace(made, lock=lock).write(generated)
    return folder


STAGES = ["--pipefusion_parallel_degree", "2"]


@pytest.mark.parametrize(
    ("model", "flags", "words"),
    [
        (
            "short",
            STAGES,
            "2 pipeline stages for 1 transformer blocks, expected at most",
        ),
        (
            "good",
            [*STAGES, "--num_pipeline_patch", "4", "--height", "48"],
            "4 patches",
        ),
        ("good", ["--ulysses_degree", "2", "--height", "130"], "have to be divisible"),
        (
            "good",
            ["--ulysses_degree", "2", "--height", "136"],
            "expected the same size",
        ),
    ],
)
def test_the_command_says_it_in_one_line(
    checkpoints: Path,
    model: str,
    flags: Sequence[str],
    words: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    call = [PIXART, "--model", model, "--prompt", "a red fox", "--width", "128"]
    call += ["--no_use_resolution_binning", "--num_inference_steps", "4"]

    def rank_main(rank: int) -> int:
        os.chdir(checkpoints)
        sys.stderr.flush()
        return run.main([*call, "--height", "128", *flags])

    before = sorted(checkpoints.rglob("*"))
    with pytest.raises(RankError, match="died with exit code 1"):
        run_ranks(rank_main, 2, grace=30)
    captured = capfd.readouterr()
    errors = [line for line in captured.err.splitlines() if "error: " in line]
    assert len(errors) == 1, captured.err
    assert words in errors[0]
    assert "Traceback" not in captured.err
    assert sorted(checkpoints.rglob("*")) == before, "a failed run wrote a file"
