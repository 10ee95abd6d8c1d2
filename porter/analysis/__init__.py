"""Read-only analysis of upstream source; frozen dataclasses come out."""
