"""The register of pipeline wrappers (manual, section 1)."""

from __future__ import annotations

from xfuser_runtime.register import WrapperRegister


class xFuserPipelineWrapperRegister(WrapperRegister):
    """Maps an upstream pipeline class to its generated wrapper."""

    kind = "Pipeline"
