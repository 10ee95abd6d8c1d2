"""The register of transformer wrappers (manual, section 2)."""

from __future__ import annotations

from xfuser_runtime.register import WrapperRegister


class xFuserTransformerWrappersRegister(WrapperRegister):
    """Maps an upstream transformer class to its generated wrapper."""

    kind = "Transformer"
