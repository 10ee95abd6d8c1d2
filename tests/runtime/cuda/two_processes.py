"""Scripts on two processes, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def check_fine(*arguments: str) -> None:
    """Run a script or `-m` module with its arguments; each process must print `fine`."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--standalone", "--nproc_per_node=2"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    found = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-4000:]
    assert found.stdout.split().count("fine") == 2
