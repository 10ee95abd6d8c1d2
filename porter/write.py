"""Writes generated files: all of them or none, and never over a hand edit."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from porter.errors import DriftError
from porter.source import sha256


def check_not_edited(
    folder: Path, outputs: Mapping[str, str], known: Mapping[str, str]
) -> None:
    """Refuses to write over a file that is not as porter left it.

    Args:
        folder: the output folder.
        outputs: the texts to write, by path below the folder.
        known: sha256 of what porter wrote last, by path.

    Raises:
        DriftError: a file differs from what the lock says and from the new text.
    """
    for path, text in outputs.items():
        file = folder / path
        if not file.exists():
            continue
        found = sha256(file.read_text(encoding="utf-8"))
        if found not in (known.get(path), sha256(text)):
            raise DriftError(
                f"{file.as_posix()} was edited by hand or is not in porter.lock",
                expected="a file as porter wrote it",
                todo="delete it, or move the edit into a subclass and pass --with",
            )


def write_all(folder: Path, outputs: Mapping[str, str]) -> list[str]:
    """Writes texts below a folder; files that are equal already are left alone.

    Everything is written beside its place first, then moved, so that an error (a full
    disk, say) leaves the old files as they are.

    Returns:
        The paths that changed.
    """
    changed = [
        path
        for path, text in sorted(outputs.items())
        if not (folder / path).is_file()
        or (folder / path).read_bytes() != text.encode()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".porter-", dir=folder))
    try:
        for number, path in enumerate(changed):
            (staging / str(number)).write_bytes(outputs[path].encode())
        for number, path in enumerate(changed):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / str(number), folder / path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return changed
