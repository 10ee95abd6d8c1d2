"""The register of scheduler wrappers (manual, section 3)."""

from __future__ import annotations

from xfuser_runtime.register import WrapperRegister


class xFuserSchedulerWrappersRegister(WrapperRegister):
    """Maps an upstream scheduler class to a wrapper written for it.

    Most schedulers need none: `wrap_scheduler` makes a wrapper of every class that has a
    `step`.  Register one to override a method.
    """

    kind = "Scheduler"
