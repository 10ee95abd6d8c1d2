"""The one error of this package."""

from __future__ import annotations

from porter.errors import PorterError


class ShrinkError(PorterError):
    """A pipeline class that cannot be shrunk: says what is missing, in one line."""
