"""Coverage: the scope is computed, a cell says what the lock proves and no more."""

from __future__ import annotations

import ast
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from porter import port
from porter.analysis.facts import PipelineFacts
from porter.cli import app
from porter.coverage import MODES, PROVEN, REFUSED, UNVERIFIED, Coverage, survey
from porter.coverage_report import json_text, markdown_text, plain_text
from porter.errors import PorterError
from porter.generate import plan
from porter.lock import LOCK_NAME, Lock, read_lock
from porter.source import pipeline_classes
from porter.tasks import pipeline_tasks, task_of

ALPHA, SIGMA = "PixArtAlphaPipeline", "PixArtSigmaPipeline"
ALL = ("dp", "cfg", "ulysses", "ring", "ring x ulysses", "pp", "pipefusion")


@pytest.fixture(scope="module")
def ported(
    measured: dict[str, PipelineFacts], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An output folder with both PixArt ports."""
    made = tmp_path_factory.mktemp("ported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(port, "_measure", lambda upstream: measured[upstream.class_name])
        plan([ALPHA, SIGMA], made).write(made)
    return made


@pytest.fixture
def folder(ported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder."""
    # The runtime that proofs are of must not be edited while a test runs.
    monkeypatch.setattr("porter.lock.runtime_sha256", lambda: "runtime")
    return Path(shutil.copytree(ported, tmp_path / "generated"))


def change(folder: Path, edit: Callable[[Lock], Lock]) -> None:
    """Writes another lock."""
    text = edit(read_lock(folder)).text()
    (folder / LOCK_NAME).write_text(text, encoding="utf-8")


def states(found: Coverage, name: str) -> dict[str, str]:
    """State by mode."""
    row = next(row for row in found.rows if row.name == name)
    return {mode: cell.state for mode, cell in row.cells.items()}


def test_nothing_is_proven_without_a_proof(folder: Path) -> None:
    assert set(states(survey(folder), ALPHA).values()) == {UNVERIFIED}
    change(folder, lambda lock: lock.with_proofs(ALPHA, dict.fromkeys(ALL, {})))
    assert set(states(survey(folder), ALPHA).values()) == {PROVEN}
    assert set(states(survey(folder), SIGMA).values()) == {UNVERIFIED}


@pytest.mark.parametrize("missing", ALL)
def test_each_mode_needs_its_own_proof(folder: Path, missing: str) -> None:
    given: dict[str, Any] = {proof: {} for proof in ALL if proof != missing}
    change(folder, lambda lock: lock.with_proofs(ALPHA, given))
    unproven = {m for m, s in states(survey(folder), ALPHA).items() if s != PROVEN}
    assert unproven == {mode for mode, needed in MODES.items() if missing in needed}
    assert unproven


@pytest.mark.parametrize("part", ["outputs", "runtime", "diffusers", "torch"])
def test_a_proof_of_something_else_counts_for_nothing(folder: Path, part: str) -> None:
    change(folder, lambda lock: lock.with_proofs(ALPHA, dict.fromkeys(ALL, {})))

    def other(lock: Lock) -> Lock:
        entry: dict[str, Any] = json.loads(json.dumps(lock.ports[ALPHA]))
        entry["proofs"]["key"][part] = "another"
        return dataclasses.replace(lock, ports={**lock.ports, ALPHA: entry})

    change(folder, other)
    row = next(row for row in survey(folder).rows if row.name == ALPHA)
    assert {cell.state for cell in row.cells.values()} == {UNVERIFIED}
    assert row.cells["dp"].reason == f"{part} changed since"


def test_what_verification_refuted_is_refused_until_something_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {proof: {} for proof in ALL if proof != "ring"}
    wrong = {"ring": {"ring2": "error 1.0e-02 > gate 1.0e-05"}}
    change(folder, lambda lock: lock.with_proofs(ALPHA, given, wrong))
    assert {m for m, s in states(survey(folder), ALPHA).items() if s == REFUSED} == {
        "ring",
        "hybrid",
    }
    row = next(row for row in survey(folder).rows if row.name == ALPHA)
    assert (
        row.cells["ring"].reason == "porter verify: ring2: error 1.0e-02 > gate 1.0e-05"
    )
    monkeypatch.setattr("porter.lock.runtime_sha256", lambda: "another")
    assert set(states(survey(folder), ALPHA).values()) == {UNVERIFIED}


def test_a_lacking_mode_is_refused_whatever_is_proven(folder: Path) -> None:
    why = "x.py:7: a list grows in the loop"

    def edit(lock: Lock) -> Lock:
        entry = {**lock.ports[ALPHA], "refused_modes": {"pipefusion": why}}
        lock = dataclasses.replace(lock, ports={**lock.ports, ALPHA: entry})
        return lock.with_proofs(ALPHA, dict.fromkeys(ALL, {}))

    change(folder, edit)
    found = survey(folder)
    assert states(found, ALPHA) == {
        mode: REFUSED if mode == "PipeFusion" else PROVEN for mode in MODES
    }
    assert f"without PipeFusion: {why}" in plain_text(found)
    assert f"- {ALPHA}, PipeFusion: {why}" in markdown_text(found)


def test_refused_pipelines_keep_their_reason_for_this_version_only(
    folder: Path,
) -> None:
    name = "HeliosPipeline"
    change(folder, lambda lock: lock.with_refusal(name, "y.py:9: two loops"))
    assert set(states(survey(folder), name).values()) == {REFUSED}
    assert f"- {name}, all: y.py:9: two loops" in markdown_text(survey(folder))

    def older(lock: Lock) -> Lock:
        entry = {**lock.refused[name], "diffusers": "0.1"}
        return dataclasses.replace(lock, refused={name: entry})

    change(folder, older)
    assert set(states(survey(folder), name).values()) == {UNVERIFIED}


def test_a_rule_with_one_user_says_why_it_is_there() -> None:
    found = survey(Path(__file__).parents[2] / "generated")
    alone = [
        rule
        for rules in found.rules.values()
        for rule, users in rules.items()
        if len(users) == 1
    ]
    assert alone
    assert [rule for rule in alone if not found.reasons[rule]] == []
    assert "no reason given" not in plain_text(found)


def test_counts_rules_and_sizes_are_of_this_lock(folder: Path) -> None:
    change(folder, lambda lock: lock.with_proofs(ALPHA, {"dp": {}}))
    found = survey(folder)
    total = len(pipeline_classes())
    assert found.counts()["dp"] == {PROVEN: 1, UNVERIFIED: total - 1, REFUSED: 0}
    assert found.rules["pipeline"]["denoising_loop"] == (ALPHA, SIGMA)
    assert found.rules["pipeline"]["cfg_micro_conditions"] == (ALPHA,)
    assert found.rules["transformer"]["block_region"] == ("PixArtTransformer2DModel",)
    assert found.rules["attention"]["attention_call"] == ("AttnProcessor2_0",)
    lines = found.changed_lines["pipeline"]
    assert found.medians()["pipeline"] == sum(lines.values()) / 2
    assert set(lines) == {ALPHA, SIGMA} and 0 < min(lines.values()) < 60


def test_the_command_writes_the_same_files_twice(folder: Path, tmp_path: Path) -> None:
    texts = []
    for number in range(2):
        files = [tmp_path / f"{number}.{end}" for end in ("json", "md")]
        result = CliRunner().invoke(
            app,
            ["coverage", "--output", str(folder), "--task", "text-to-image"]
            + ["--json", str(files[0]), "--markdown", str(files[1])],
        )
        assert result.exit_code == 0, result.stderr
        texts.append([file.read_text("utf-8") for file in files])
    assert texts[0] == texts[1]
    data = json.loads(texts[0][0])
    assert texts[0][0] == json.dumps(data, indent=2, sort_keys=True) + "\n"
    assert {row["task"] for row in data["pipelines"].values()} == {"text-to-image"}
    assert data["pipelines"][ALPHA]["modes"].keys() == MODES.keys()
    assert json_text(survey(folder, "text-to-image")) == texts[0][0]


def test_no_such_task_is_an_error(folder: Path) -> None:
    with pytest.raises(PorterError, match="no pipeline for"):
        survey(folder, "text-to-soup")


def test_the_scope_is_what_the_signatures_say() -> None:
    tasks = pipeline_tasks()
    found = {name for name, task in tasks.items() if task == "text-to-image"}
    assert 40 <= len(found) <= 50
    # A picture that may be given, one hidden behind a helper, and none at all.
    assert {"Flux2Pipeline", "GlmImagePipeline", "DiTPipeline", ALPHA} <= found
    assert tasks["FluxImg2ImgPipeline"] == "image-to-image"
    assert tasks["QwenImageEditPipeline"] == "image-to-image"
    assert tasks["StableDiffusion3ControlNetPipeline"] == "image-to-image"
    assert tasks["WanPipeline"] == "text-to-video"
    assert tasks["WanVideoToVideoPipeline"] == "video-to-video"
    assert tasks["StableAudioPipeline"] == "text-to-audio"
    # Codes of a vocabulary are not denoised.
    assert "VQDiffusionPipeline" not in tasks and "AmusedPipeline" not in tasks


@pytest.mark.parametrize(
    ("signature", "body", "task"),
    [
        ("prompt", "pass", "text-to-image"),
        ("noise", "pass", "other-to-image"),
        ("prompt, image", "pass", "image-to-image"),
        ("prompt, image=None", "use(image)", "image-to-image"),
        ("prompt, image=None", "self.check_inputs(image)", "image-to-image"),
        ("prompt, image=None", "if image is not None: use(image)", "text-to-image"),
        ("prompt, image=None", "self.prepare(image)", "text-to-image"),
        ("prompt, image=None", "self.static(image)", "text-to-image"),
        ("prompt, image=None", "self.blind(image)", "image-to-image"),
        (
            "prompt, image=None",
            "size = image.size\n        if image is None: pass",
            "image-to-image",
        ),
        (
            "prompt, image=None",
            "if image is not None: size = image.size",
            "text-to-image",
        ),
        ("prompt, *, video", "pass", "video-to-image"),
        ("prompt, image_scale", "pass", "text-to-image"),
    ],
)
def test_needed_media(signature: str, body: str, task: str) -> None:
    text = f"""
class Toy:
    def __call__(self, {signature}) -> ImagePipelineOutput | tuple:
        {body}

    def check_inputs(self, image):
        return image is None

    def prepare(self, picture):
        return picture is None

    @staticmethod
    def static(picture):
        return picture is None

    def blind(self, picture):
        return picture
"""
    node = ast.parse(text).body[0]
    assert isinstance(node, ast.ClassDef)
    assert task_of("diffusers.pipelines.flux.pipeline_flux", node) == (
        task.replace("-to-image", "-to-other")
    )
    assert (
        task_of("diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha", node) == task
    )
