"""A port from name to files: the manual's edits, shared files, drift."""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from porter import source
from porter.analysis.facts import PipelineFacts, TransformerFacts
from porter.diff import hunks
from porter.errors import DriftError, Refusal
from porter.generate import drift, plan
from porter.lock import read_lock
from porter.port import lock_entry, make_port, render_ports

ALPHA, SIGMA = "PixArtAlphaPipeline", "PixArtSigmaPipeline"
Facts = dict[str, PipelineFacts]


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def add(folder: Path, *names: str, **options: Any) -> list[str]:
    """`porter add-model`; the paths that changed."""
    return plan(names, folder, **options).write(folder)


def test_one_port_writes_three_files_and_the_lock(quick: Facts, tmp_path: Path) -> None:
    add(tmp_path, ALPHA)
    assert set(files(tmp_path)) == {
        "pipelines/pipeline_pixart_alpha.py",
        "transformers/pixart_transformer_2d.py",
        "attention/attention_processor.py",
        "porter.lock",
    }


def test_a_second_run_changes_nothing(quick: Facts, tmp_path: Path) -> None:
    add(tmp_path, ALPHA)
    before = files(tmp_path)
    assert add(tmp_path, ALPHA) == []
    assert files(tmp_path) == before


def test_the_order_of_ports_does_not_matter(quick: Facts, tmp_path: Path) -> None:
    add(tmp_path / "ab", ALPHA)
    add(tmp_path / "ab", SIGMA)
    add(tmp_path / "ba", SIGMA)
    add(tmp_path / "ba", ALPHA)
    add(tmp_path / "both", SIGMA, ALPHA)
    assert files(tmp_path / "ab") == files(tmp_path / "ba") == files(tmp_path / "both")


@pytest.mark.parametrize("name", [ALPHA, SIGMA])
def test_the_diff_shows_each_edit_of_the_manual(quick: Facts, name: str) -> None:
    port = make_port(name)
    outputs = render_ports([port])
    pipeline = port.classes[0]
    (path,) = (p for p in outputs if p.startswith("pipelines/"))
    shown = hunks(pipeline, outputs[path])
    sections = {section for hunk in shown for section in hunk.manual}
    wanted = {"1", "1.1 step 1", "1.1 step 2", "1.1 step 4", "1.1 step 5"}
    assert wanted <= sections
    # Only one of the two has micro-conditions upstream.
    assert ("1.1 step 3" in sections) == (name == ALPHA)
    added = "\n".join(x for h in shown for x in h.lines if x.startswith("+"))
    assert "get_runtime_state().set_input_parameters(" in added
    assert "self._process_cfg_split_batch(" in added
    assert added.index("negative_prompt_embeds, prompt_embeds") > 0
    assert "if is_dp_last_group():" in added


def test_a_generated_file_carries_licence_and_banner(quick: Facts) -> None:
    for text in render_ports([make_port(ALPHA)]).values():
        lines = text.splitlines()
        assert "Licensed under the Apache License" in "\n".join(lines[:6])
        assert any("DO NOT EDIT" in line for line in lines[:30])
        assert source.library_version() in text
        assert str(source.package_root("diffusers")) not in text


def test_the_class_is_a_subclass_with_from_pretrained(quick: Facts) -> None:
    outputs = render_ports([make_port(ALPHA)])
    tree = ast.parse(outputs["pipelines/pipeline_pixart_alpha.py"])
    (node,) = (n for n in tree.body if isinstance(n, ast.ClassDef))
    assert node.name == "xFuserPixArtAlphaPipeline"
    assert [ast.unparse(b) for b in node.bases] == ["xFuserPipelineBaseWrapper", ALPHA]
    methods = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
    assert set(methods) == {"from_pretrained", "__call__"}
    assert [ast.unparse(d) for d in methods["__call__"].decorator_list] == [
        "torch.no_grad()",
        "xFuserPipelineBaseWrapper.enable_data_parallel",
        "xFuserPipelineBaseWrapper.check_to_use_naive_forward",
    ]


def test_a_transformer_that_ranks_cannot_share_keeps_guidance(quick: Facts) -> None:
    reason = "toy.py:1: a block that mixes tokens"
    whole = {"transformer": TransformerFacts((), {}, (), (), whole=reason)}
    port = make_port(ALPHA, replace(quick[ALPHA], transformers=whole))
    refused = port.classes[0].refused_modes
    assert refused == dict.fromkeys(("ulysses", "ring", "pp", "pipefusion"), reason)
    wrapper = port.classes[1]
    assert wrapper.rewrite.counts == {"forward_check_condition": 1}
    assert wrapper.text.endswith(wrapper.original)
    assert lock_entry(port, render_ports([port]))["refused_modes"] == refused


def test_a_hand_edit_is_refused_and_kept(quick: Facts, tmp_path: Path) -> None:
    add(tmp_path, ALPHA)
    edited = tmp_path / "pipelines/pipeline_pixart_alpha.py"
    edited.write_text(edited.read_text() + "# mine\n")
    before = files(tmp_path)
    with pytest.raises(DriftError, match="edited by hand"):
        add(tmp_path, ALPHA)
    assert files(tmp_path) == before
    assert any("edited by hand" in reason for reason in drift(tmp_path)[ALPHA])


def test_fresh_ports_have_not_drifted(quick: Facts, tmp_path: Path) -> None:
    add(tmp_path, ALPHA, SIGMA)
    assert drift(tmp_path) == {ALPHA: [], SIGMA: []}


def test_a_lock_of_another_diffusers_has_drifted(quick: Facts, tmp_path: Path) -> None:
    add(tmp_path, ALPHA)
    lock = tmp_path / "porter.lock"
    data = json.loads(lock.read_text())
    data["ports"][ALPHA]["diffusers"] = "0.0.1"
    lock.write_text(json.dumps(data))
    assert "made from diffusers 0.0.1" in drift(tmp_path)[ALPHA][0]


def test_a_changed_upstream_symbol_is_named(
    quick: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated = tmp_path / "generated"
    add(generated, ALPHA)
    site = tmp_path / "site"
    root = source.package_root("diffusers")
    shutil.copytree(
        root, site / "diffusers", ignore=shutil.ignore_patterns("__pycache__")
    )
    path = site / "diffusers/pipelines/pixart_alpha/pipeline_pixart_alpha.py"
    text = path.read_text()
    path.write_text(
        text.replace("def retrieve_timesteps(", "def retrieve_timesteps( ", 1)
    )
    code = f"""
        import sys; sys.path.insert(0, {str(site)!r})
        from porter.cli import app
        app(["check", "--output", {str(generated)!r}])
    """
    import subprocess

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "pipeline_pixart_alpha.retrieve_timesteps changed" in done.stdout
    assert done.stdout.count("changed") == 1


OVERRIDE = """
from xfuser_generated.pipelines.pipeline_pixart_alpha import xFuserPixArtAlphaPipeline


class Mine(xFuserPixArtAlphaPipeline):
    def _sync_pipeline(self, *args, **kwargs):
        return super()._sync_pipeline(*args, **kwargs)
"""


def test_an_override_is_recorded_and_part_of_the_outputs(
    quick: Facts, tmp_path: Path
) -> None:
    overrides = tmp_path / "overrides.py"
    overrides.write_text(OVERRIDE)
    add(tmp_path / "out", ALPHA, override=overrides)
    entry = read_lock(tmp_path / "out").ports[ALPHA]
    assert entry["override"]["class"] == "Mine"
    written = tmp_path / "out" / entry["override"]["file"]
    assert written.read_text() == OVERRIDE
    assert entry["outputs"][entry["override"]["file"]] == source.sha256(OVERRIDE)
    assert drift(tmp_path / "out") == {ALPHA: []}
    assert add(tmp_path / "out", ALPHA) == [], "a run without --with keeps it"
    written.unlink()
    add(tmp_path / "out", ALPHA)
    assert read_lock(tmp_path / "out").ports[ALPHA]["override"] is None


def test_a_port_of_an_older_diffusers_is_made_anew_with_its_neighbours(
    quick: Facts, tmp_path: Path
) -> None:
    add(tmp_path / "fresh", ALPHA, SIGMA)
    add(tmp_path / "old", ALPHA)
    lock = tmp_path / "old/porter.lock"
    data = json.loads(lock.read_text())
    data["ports"][ALPHA].update(diffusers="0.0.1", facts={})
    lock.write_text(json.dumps(data))
    add(tmp_path / "old", SIGMA)
    assert files(tmp_path / "old") == files(tmp_path / "fresh")


def test_an_override_of_another_class_is_refused(quick: Facts, tmp_path: Path) -> None:
    overrides = tmp_path / "overrides.py"
    overrides.write_text("class Mine: ...\n")
    with pytest.raises(Refusal, match="0 subclasses of xFuserPixArtAlphaPipeline"):
        add(tmp_path / "out", ALPHA, override=overrides)
    assert not (tmp_path / "out").exists()


def test_missing_names_of_optional_packages_go_through_the_module(quick: Facts) -> None:
    text = render_ports([make_port(ALPHA)])["pipelines/pipeline_pixart_alpha.py"]
    assert 'xm = getattr(upstream_module, "xm", None)' in text
    assert importlib.util.find_spec("torch_xla") is None
