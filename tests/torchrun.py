"""Two ranks as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def torchrun(
    *arguments: str, timeout: float, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run a script or `-m` module with its arguments, in `folder`, on two ranks.

    They meet at a port of their own, so that several tests can do so at a time.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def check_fine(*arguments: str) -> None:
    """Run them; each rank must print `fine`."""
    found = torchrun(*arguments, timeout=280)
    assert found.returncode == 0, found.stderr[-4000:]
    assert found.stdout.split().count("fine") == 2
