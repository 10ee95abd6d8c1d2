"""The built wheel works in an empty environment, outside the checkout.

The environment borrows the dependencies of this one by a path alone, so nothing is
downloaded and the editable install of this checkout is not seen.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel; its `bin` folder."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install"]
    subprocess.run([*command, "--quiet", "--no-deps", str(wheel)], check=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    borrowed = sysconfig.get_paths()["purelib"]
    (site_packages / "borrowed.pth").write_text(f"{borrowed}\n")
    return folder / "bin"


def run(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `command` in `folder`, with no trace of the checkout in the environment."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, timeout=240
    )


def test_wheel_holds_what_it_needs_and_no_more(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"porter/py.typed", "xfuser_runtime/py.typed"} <= set(names)
    frames = {f"porter/{p.relative_to(ROOT)}" for p in ROOT.glob("templates/**/*.j2")}
    assert frames and frames <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "porter",
        "xfuser_runtime",
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_packages_come_from_the_wheel(environment: Path, tmp_path: Path) -> None:
    code = "import porter, xfuser_runtime as x; print(porter.__file__, x.__file__)"
    found = run([environment / "python", "-c", code], tmp_path)
    assert found.returncode == 0, found.stderr
    assert all(p.startswith(str(environment.parent)) for p in found.stdout.split())


@pytest.mark.parametrize("start", [["porter"], ["python", "-m", "porter"]])
def test_both_ways_to_start_porter(
    start: list[str], environment: Path, tmp_path: Path
) -> None:
    result = run([environment / start[0], *start[1:], "list-rules"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "denoising_loop" in result.stdout


def test_wheel_makes_a_port_and_loads_it(environment: Path, tmp_path: Path) -> None:
    added = run([environment / "porter", "add-model", "PixArtAlphaPipeline"], tmp_path)
    assert added.returncode == 0, added.stderr
    assert (tmp_path / "generated" / "porter.lock").is_file()
    code = (
        "from xfuser_runtime import load_pipeline_class as load;"
        "print(load('PixArtAlphaPipeline', generated='generated').__name__)"
    )
    loaded = run([environment / "python", "-c", code], tmp_path)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split()[-1] == "xFuserPixArtAlphaPipeline"


def test_version_is_the_same_everywhere(environment: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.metadata as m, porter;"
        "assert m.version('porter') == porter.__version__"
    )
    assert run([environment / "python", "-c", code], tmp_path).returncode == 0
