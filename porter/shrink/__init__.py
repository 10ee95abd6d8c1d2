"""Tiny models for proofs: real checkpoint folders, lively weights, calls that fit."""

from .checkpoint import component_hints, make_checkpoint, make_pipeline
from .errors import ShrinkError
from .kwargs import call_kwargs, image_sizes, takes_one_prompt
from .table import PROCESSOR_CALLS
from .weights import enliven

__all__ = [
    "PROCESSOR_CALLS",
    "ShrinkError",
    "call_kwargs",
    "component_hints",
    "enliven",
    "image_sizes",
    "make_checkpoint",
    "make_pipeline",
    "takes_one_prompt",
]
