"""Runs a shrunken model and measures what its source alone does not say.

Token axes, the order of keys, doubled batch axes: each is measured at two image sizes and
two text lengths (three batch sizes for guidance), so that no size is mistaken for another.
"""

from __future__ import annotations

from porter.probe.pipeline import probe_pipeline

__all__ = ["probe_pipeline"]
