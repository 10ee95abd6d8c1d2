"""The command line: exit codes, one-line errors, JSON, no traceback by default."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from porter import source
from porter.analysis.facts import PipelineFacts
from porter.cli import app
from porter.rules import attention, pipeline, transformer

runner = CliRunner()
ALPHA = "PixArtAlphaPipeline"


def run(*args: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    result = runner.invoke(app, list(args))
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["add-model", "PixArtAlfaPipeline"], 2, "did you mean PixArtAlphaPipeline"),
        (["add-model", "StableDiffusionPipeline"], 1, "has no transformer"),
        (["add-model"], 2, "no pipeline, expected NAME"),
        (["add-model", "A", "B", "--with", "x.py"], 2, "--with for several"),
        (["add-model", "nowhere.module:Thing"], 2, "no package nowhere"),
        (["diff", "NoSuchPipeline"], 2, "unknown class NoSuchPipeline"),
    ],
)
def test_bad_input_is_one_line(
    args: list[str], code: int, words: str, tmp_path: Path
) -> None:
    found, out, err = run(*args, "--output", str(tmp_path / "out"))
    errors = [line for line in err.splitlines() if not line.startswith("porting ")]
    assert found == code
    assert len(errors) == 1 and errors[0].startswith("error: ")
    assert words in errors[0]
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_traceback_on_demand() -> None:
    result = runner.invoke(app, ["add-model", "NoSuch", "--traceback"])
    assert result.exception is not None and "NoSuch" in str(result.exception)


def test_a_fault_of_ours_is_one_line_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise KeyError("inside")

    monkeypatch.setattr("porter.cli.plan", broken)
    code, out, err = run("add-model", ALPHA)
    assert code == 2 and out == ""
    assert err.startswith("error: KeyError: 'inside'") and "--traceback" in err


def test_list_rules_prints_every_rule() -> None:
    code, out, _ = run("list-rules")
    ids = [r().id for p in (pipeline, transformer, attention) for r in p.RULES]
    assert code == 0
    assert [line.split()[1] for line in out.splitlines()] == ids
    code, out, _ = run("list-rules", "--json")
    assert [row["id"] for row in json.loads(out)] == ids


def test_add_diff_and_check(quick: dict[str, PipelineFacts], tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert run("add-model", ALPHA, "--check", "--output", folder)[0] == 1
    code, out, _ = run("add-model", ALPHA, "--diff", "--output", folder)
    assert code == 0 and "denoising_loop [manual 1.1 step 4]" in out
    assert not list(tmp_path.iterdir())
    code, out, err = run("add-model", ALPHA, "--json", "--output", folder)
    assert code == 0
    assert json.loads(out)[ALPHA]["status"] == "ported"
    assert err.splitlines() == [f"porting {ALPHA}"]
    assert run("add-model", ALPHA, "--check", "--output", folder)[0] == 0
    assert run("check", "--output", folder)[:2] == (0, f"{ALPHA}: as the lock says\n")
    code, out, _ = run("diff", ALPHA, "--json", "--output", folder)
    assert {item["class"] for item in json.loads(out)[ALPHA]} == {
        "xFuserPixArtAlphaPipeline",
        "xFuserPixArtTransformer2DWrapper",
        "xFuserAttnProcessor2_0Wrapper",
    }


def test_check_of_nothing_is_fine(tmp_path: Path) -> None:
    assert run("check", "--json", "--output", str(tmp_path))[:2] == (0, "{}\n")


def test_a_class_outside_diffusers_by_its_module() -> None:
    upstream = source.load("tests.toys.joint_pipeline:" + _first_class())
    assert upstream.module.file == "tests/toys/joint_pipeline.py"


def _first_class() -> str:
    import ast

    text = (Path(__file__).parent.parent / "toys/joint_pipeline.py").read_text()
    classes = [n for n in ast.parse(text).body if isinstance(n, ast.ClassDef)]
    return next(n.name for n in classes if n.name.endswith("Pipeline"))
