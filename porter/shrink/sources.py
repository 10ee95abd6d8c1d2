"""The source of classes and functions, looked up once: the library reads whole files."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any


@cache
def source_of(definition: Any) -> str:
    """The text of a class, a function or a module."""
    return inspect.getsource(definition)
