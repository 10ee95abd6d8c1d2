"""Text and image encoders on the first rank of a replica, whose results the others receive.

`share.py` says which components and wraps them, `calls.py` runs a call on the first rank,
`results.py` sends what it returned, `absent.py` stands for weights that a rank lacks, and
`loading.py` makes an encoder without reading them.
"""

from __future__ import annotations

from xfuser_runtime.encoders.loading import load_empty
from xfuser_runtime.encoders.share import is_encoder_class, names_before, share_encoders

__all__ = ["is_encoder_class", "load_empty", "names_before", "share_encoders"]
