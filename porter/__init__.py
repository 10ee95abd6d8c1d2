"""Porter: reads installed diffusers source and rewrites it for a parallel runtime."""

from __future__ import annotations

__version__ = "0.1.0"
