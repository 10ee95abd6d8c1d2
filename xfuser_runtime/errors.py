"""Errors whose message is for the user: one line, and no traceback is needed to act on it.

Each reads ``<what was found>, expected <what>; <what to do>``.
"""

from __future__ import annotations


class XFuserError(Exception):
    """Base of the errors that the runtime raises for its user."""


class ConfigError(XFuserError, ValueError):
    """A configuration that cannot run: degrees, flags, sizes."""


class InputError(XFuserError, ValueError):
    """Arguments of a call that do not fit together or do not fit the configuration."""


class NotSupportedError(XFuserError, ValueError):
    """A scheduler, layer, attention processor or mode without an implementation or a proof."""


class StateError(XFuserError, RuntimeError):
    """A function was called before what it needs was initialised."""
