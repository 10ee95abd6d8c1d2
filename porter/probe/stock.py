"""Where upstream's own code fails on a tiny copy, the port is refused, not broken."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from porter.errors import PorterError, Refusal
from porter.source import LIBRARY

_OURS = str(Path(__file__).parents[1])


@contextmanager
def upstream_runs(pipeline_class: type) -> Iterator[None]:
    """Code that makes or runs a tiny copy of a stock pipeline and does nothing else.

    A fault of porter's own, with no upstream code in between, passes through.

    Raises:
        Refusal: the copy fails; names diffusers' line that failed last.
    """
    try:
        yield
    except PorterError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        places = [place for frame in frames if (place := _upstream_place(frame))]
        if not places and frames[-1].filename.startswith(_OURS):
            raise
        message = (str(error).splitlines() or [""])[0].rstrip(". ")
        todo = "say in porter/shrink/table.py what the class asks for"
        if _is_broken(pipeline_class, error) and _upstream_place(frames[-1]):
            todo = "no call of this class runs until diffusers is mended"
        raise Refusal(
            f"the tiny copy of {pipeline_class.__name__} fails in upstream's own code"
            f" ({type(error).__name__}: {message})",
            expected="a stock run to measure",
            todo=todo,
            where=places[-1] if places else "",
        ) from error


def _is_broken(pipeline_class: type, error: Exception) -> bool:
    """Whether a class's own method was given an argument that it does not take."""
    text = str(error)
    own = text.startswith(f"{pipeline_class.__name__}.")
    return (
        isinstance(error, TypeError) and own and "unexpected keyword argument" in text
    )


def _upstream_place(frame: traceback.FrameSummary) -> str:
    """`file:line` of a frame in diffusers, or ''."""
    parts = Path(frame.filename).parts
    if LIBRARY not in parts:
        return ""
    start = len(parts) - 1 - parts[::-1].index(LIBRARY)
    return f"{'/'.join(parts[start:])}:{frame.lineno}"
