"""`python -m xfuser_runtime.run`: pictures, reports, and one line for every wrong call.

Runs are forked ranks of this warm process that call `main`; two tests start torchrun as a
user does.  Wrong calls run in this process: they end before any collective.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from porter.generate import plan
from porter.lock import read_lock
from porter.shrink import make_checkpoint
from tests.ranks import run_ranks
from tests.torchrun import torchrun
from xfuser_runtime import run
from xfuser_runtime.args import xFuserArgs
from xfuser_runtime.images import image_difference
from xfuser_runtime.loader import load_upstream_class

NAME = "PixArtAlphaPipeline"
ROOT = Path(__file__).resolve().parent.parent
PROVEN = ("dp", "cfg", "ulysses")
PROMPT = "a red fox in deep snow"
CALL = [NAME, "--model", "checkpoint", "--height", "128", "--width", "128"]
CALL += ["--no_use_resolution_binning", "--num_inference_steps", "4"]

Told = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny checkpoint, a port of it, and stock's picture of `PROMPT`."""
    folder = tmp_path_factory.mktemp("workshop")
    make_checkpoint(load_upstream_class(NAME), folder / "checkpoint")
    generated = folder / "generated"
    made = plan([NAME], generated)
    lock = made.lock.with_proofs(NAME, {mode: {} for mode in PROVEN})
    dataclasses.replace(made, lock=lock).write(generated)
    assert launch(folder, ["--stock", "--output", "stock.png"]) == [0]
    return folder


def launch(
    folder: Path, flags: Sequence[str], *, ranks: int = 1, prompts: Sequence[str] = ()
) -> list[int]:
    """Calls `main` in `folder` on forked ranks; their exit codes."""

    def rank_main(rank: int) -> int:
        os.chdir(folder)
        return run.main([*CALL, "--prompt", *(prompts or [PROMPT]), *flags])

    return run_ranks(rank_main, ranks) if ranks > 1 else [forked(rank_main)]


def forked(main: Callable[[int], int]) -> int:
    """The exit code of `main(0)` in a forked process: a failed run ends its process."""
    process = os.fork()
    if not process:
        code = 70
        try:
            code = main(0)
            sys.stdout.flush()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def under_torchrun(
    folder: Path, flags: Sequence[str]
) -> subprocess.CompletedProcess[str]:
    """The command in `folder` on two ranks of torchrun."""
    command = ["-m", "xfuser_runtime.run", *CALL, "--prompt", PROMPT, *flags]
    return torchrun(*command, timeout=240, folder=folder)


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(xFuserArgs):
        assert f"--{field.name} " in text or f"--{field.name}]" in text
    assert "torchrun --nproc_per_node=2" in text and "exit codes" in text


def test_a_module_that_cannot_be_imported_is_named(
    capfd: pytest.CaptureFixture[str],
) -> None:
    code = forked(
        lambda rank: run.main([*CALL, "--prompt", PROMPT, "--import", "no.such.module"])
    )
    assert code == 2
    assert "--import no.such.module" in capfd.readouterr().err


def test_help_needs_no_torch() -> None:
    code = "import sys, xfuser_runtime.run; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_port_on_one_process_is_stock(
    workshop: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(workshop, ["--output", "one.png", "--json"]) == [0]
    assert image_difference(workshop / "one.png", workshop / "stock.png") == (0.0, 0)
    report = json.loads(capfd.readouterr().out)
    assert report["layout"] == "one process"
    assert 0 < report["step_seconds"] < report["run_seconds"]
    assert report["peak_bytes"] > 0


def test_memory_of_each_rank(workshop: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of the blocks each of two stages holds half, of all else both hold the same."""
    stages = ["--pipefusion_parallel_degree", "2", "--warmup_steps", "4"]
    flags = [*stages, "--num_pipeline_patch", "1", "--allow_unproven"]
    output = ["--output", "pp.png", "--json", "--report-memory"]
    assert launch(workshop, [*flags, *output], ranks=2) == [0, 0]
    assert_same_picture(workshop / "pp.png", workshop / "stock.png")
    memory = json.loads(capfd.readouterr().out)["memory"]
    assert [(held["rank"], held["stage"]) for held in memory] == [(0, 0), (1, 1)]
    first, second = memory
    assert first["blocks"] == second["blocks"] > 0
    assert first["weights"] == second["weights"]
    whole = bytes_of_saved_blocks(workshop / "checkpoint" / "transformer")
    assert first["blocks"] + second["blocks"] == whole
    assert all(0 < held["resident"] <= held["peak"] for held in memory)


def test_text_encoders_on_the_first_rank_of_each_replica(
    workshop: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The pictures are those of the run without the option; four ranks, two replicas."""
    prompts = [PROMPT, "two boats on a lake"]
    split = ["--data_parallel_degree", "2", "--use_cfg_parallel", "--allow_unproven"]
    for name, more in (
        ("whole", []),
        ("first", ["--text_encoders_on_first_rank"]),
    ):
        flags = [*split, *more, "--report_memory", "--json", "--output", f"{name}.png"]
        assert launch(workshop, flags, ranks=4, prompts=prompts) == [0] * 4
    for end in (".png", "_replica1.png"):
        mine, theirs = workshop / f"first{end}", workshop / f"whole{end}"
        assert image_difference(mine, theirs) == (0.0, 0)
    whole, first = (
        [held["weights"]["text_encoder"] for held in json.loads(line)["memory"]]
        for line in capfd.readouterr().out.splitlines()
        if line.startswith("{")
    )
    assert len(set(whole)) == 1 and whole[0] > 0
    assert first == [whole[0], 0, whole[0], 0]


def bytes_of_saved_blocks(folder: Path) -> int:
    """Bytes of the transformer blocks in a folder of weights."""
    return sum(
        tensor.numel() * tensor.element_size()
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
        if name.startswith("transformer_blocks.")
    )


def test_torchrun_saves_stocks_picture_and_reports_once(workshop: Path) -> None:
    output = ["--output", "pictures/cfg.png", "--reference", "stock.png"]
    done = under_torchrun(workshop, ["--use_cfg_parallel", *output])
    assert done.returncode == 0, done.stderr
    assert_same_picture(workshop / "pictures" / "cfg.png", workshop / "stock.png")
    lines = done.stdout.splitlines()
    assert lines[0] == "saved pictures/cfg.png"
    assert lines[1].startswith("difference from stock.png: mean 0.0")
    assert lines[2] == f"xFuser{NAME}: cfg 2 on 2 ranks"
    assert re.fullmatch(
        r"load .* s, run .* s a step\), peak memory \d+ MiB.*", lines[3]
    )
    assert len(lines) == 4, "one rank alone reports"
    assert done.stderr.count("| 0/4 [") == 1, "one rank alone shows progress"


def test_ulysses_saves_stocks_picture(workshop: Path) -> None:
    flags = ["--ulysses_degree", "2", "--output", "ulysses.png"]
    assert launch(workshop, flags, ranks=2) == [0, 0]
    assert_same_picture(workshop / "ulysses.png", workshop / "stock.png")


def assert_same_picture(path: Path, expected: Path) -> None:
    """Rounding in fp32 may flip one level of 255; anything else is another picture."""
    mean, largest = image_difference(path, expected)
    assert largest <= 1 and mean < 0.01


def test_another_prompt_is_another_picture(workshop: Path) -> None:
    launch(workshop, ["--output", "other.png"], prompts=["two boats"])
    assert image_difference(workshop / "other.png", workshop / "stock.png")[1] > 30


def test_each_replica_saves_its_own_prompts(workshop: Path) -> None:
    prompts = [PROMPT, "two boats on a lake"]
    launch(workshop, ["--stock", "--output", "both.png"], prompts=prompts)
    flags = ["--data_parallel_degree", "2", "--output", "dp.png"]
    assert launch(workshop, flags, ranks=2, prompts=prompts) == [0, 0]
    for mine, theirs in (("dp.png", "both_0.png"), ("dp_replica1.png", "both_1.png")):
        assert_same_picture(workshop / mine, workshop / theirs)


@pytest.mark.parametrize(("kind", "suffix"), [("np", ".npy"), ("latent", ".pt")])
def test_arrays_and_latents_are_saved_as_such(
    kind: str, suffix: str, workshop: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(workshop, ["--output_type", kind, "--output", "a.png"]) == [0]
    assert capfd.readouterr().out.startswith(f"saved a{suffix}")
    assert (workshop / f"a{suffix}").is_file()


@pytest.fixture
def told(
    workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Told:
    """Calls `main` in the workshop; the exit code and the one line on stderr."""
    monkeypatch.chdir(workshop)
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def call(flags: list[str], world_size: int = 1) -> tuple[int, str]:
        before = sorted(workshop.rglob("*"))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        code = run.main(flags)
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert captured.out == "" and line.startswith("error: ")
        assert sorted(workshop.rglob("*")) == before, "a failed run wrote a file"
        return code, line

    return call


GOOD = [NAME, "--model", "checkpoint", "--prompt", PROMPT]


@pytest.mark.parametrize(
    ("flags", "world_size", "code", "words"),
    [
        (
            [NAME, "--model", "checkpoint"],
            1,
            2,
            "no prompt, expected one; pass --prompt",
        ),
        ([NAME, "--prompt", "a"], 1, 2, "no checkpoint folder, expected --model DIR"),
        ([*GOOD, "--model", "nowhere"], 1, 2, "nowhere: no model_index.json"),
        ([*GOOD, "--generated", "no"], 1, 2, "no/porter.lock: no such file"),
        (["PixArtSigmaPipeline", *GOOD[1:]], 1, 2, "no port of PixArtSigmaPipeline"),
        (["PixArtAlpha", *GOOD[1:], "--stock"], 1, 2, "no class PixArtAlpha in diff"),
        ([*GOOD, "--stock"], 2, 2, "--stock on 2 processes, expected 1"),
        ([*GOOD, "--reference", "no.png"], 1, 2, "no.png: no such file"),
        ([*GOOD, "--num_frames", "8"], 1, 2, "no parameter num_frames"),
        ([*GOOD, "--num_inference_steps", "0"], 1, 2, "num_inference_steps=0"),
        (
            [*GOOD, "--ulysses_degree", "2"],
            1,
            2,
            "ulysses_degree(2) = 2 ranks, expected",
        ),
        ([*GOOD, "--ring_degree", "2"], 2, 1, "mode `ring` is not proven, expected"),
        (
            [*GOOD, "--pipefusion_parallel_degree", "2"],
            2,
            1,
            "mode `pipefusion` is not",
        ),
        ([*GOOD, "--tensor_parallel_degree", "2"], 2, 1, "tensor parallelism is not"),
        (
            [*GOOD, "--attention_backend", "no"],
            1,
            2,
            "attention_backend 'no', expected",
        ),
        ([*GOOD, "--use_parallel_vae"], 1, 1, "parallel VAE is not implemented"),
    ],
)
def test_a_wrong_call_ends_in_one_line(
    told: Told, flags: list[str], world_size: int, code: int, words: str
) -> None:
    found = told(flags, world_size)
    assert found[0] == code
    assert words in found[1]


def test_a_checkpoint_of_another_class_is_refused(told: Told, workshop: Path) -> None:
    index = workshop / "checkpoint" / "model_index.json"
    text = index.read_text()
    try:
        index.write_text(text.replace(NAME, "FluxPipeline"))
        code, line = told(GOOD)
        assert code == 2
        assert f"a checkpoint of FluxPipeline, expected {NAME};" in line
        index.write_text("{}")
        assert "no _class_name" in told(GOOD)[1]
    finally:
        index.write_text(text)


def test_an_edited_port_is_refused(told: Told, workshop: Path) -> None:
    file = workshop / "generated" / "pipelines" / "pipeline_pixart_alpha.py"
    text = file.read_text()
    try:
        file.write_text(text.replace("latents", "latents "))
        code, line = told(GOOD)
    finally:
        file.write_text(text)
    assert (
        code == 1 and "pipeline_pixart_alpha.py: edited since porter wrote it" in line
    )


def test_a_port_of_an_older_diffusers_is_refused(told: Told, workshop: Path) -> None:
    file = workshop / "generated" / "porter.lock"
    text = file.read_text()
    version = read_lock(file.parent).ports[NAME]["diffusers"]
    try:
        file.write_text(
            text.replace(f'"diffusers": "{version}"', '"diffusers": "0.30.0"')
        )
        code, line = told(GOOD)
    finally:
        file.write_text(text)
    assert code == 1 and "made from diffusers 0.30.0, expected the installed" in line


def test_a_refusal_under_torchrun_is_said_once(workshop: Path) -> None:
    done = under_torchrun(workshop, ["--ring_degree", "2", "--output", "no.png"])
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "mode `ring` is not proven" in errors[0]
    assert not (workshop / "no.png").exists()


def test_an_unproven_mode_runs_when_allowed_and_warns(
    workshop: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--ring_degree", "2", "--allow_unproven", "--output", "ring.png"]
    assert launch(workshop, flags, ranks=2) == [0, 0]
    assert capfd.readouterr().err.count("mode `ring` is not proven") == 1
    assert_same_picture(workshop / "ring.png", workshop / "stock.png")


def test_pictures_of_different_sizes_are_not_compared(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 9)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"expected \(8, 8\) RGB"):
        image_difference(tmp_path / "a.png", tmp_path / "b.png")
