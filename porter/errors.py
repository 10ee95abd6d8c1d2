"""Errors of the porter: fields only, `porter.report` puts them into words."""

from __future__ import annotations

from typing import ClassVar


class PorterError(Exception):
    """Something that stops a port, told in one line.

    Args:
        found: what was found, as a noun phrase.
        expected: what was expected instead; may be empty.
        todo: what the reader can do about it; may be empty.
        where: `file:line`, the file relative to its package's parent; may be empty.
    """

    exit_code: ClassVar[int] = 2

    def __init__(
        self, found: str, *, expected: str = "", todo: str = "", where: str = ""
    ) -> None:
        super().__init__(found)
        self.found = found
        self.expected = expected
        self.todo = todo
        self.where = where

    def __str__(self) -> str:
        head = f"{self.where}: {self.found}" if self.where else self.found
        if self.expected:
            head += f", expected {self.expected}"
        return f"{head}; {self.todo}" if self.todo else head


class Refusal(PorterError):
    """The input is understood and the port would not be right: nothing is written."""

    exit_code: ClassVar[int] = 1


class RuleError(Refusal):
    """A rule met another number of matches than it expects, or edits that clash."""


class DriftError(PorterError):
    """Generated files, the lock and the installed source do not agree."""

    exit_code: ClassVar[int] = 1


class InternalError(PorterError):
    """A fault of porter's own, or of a process that it started, in the port of one class.

    Args:
        found: what happened, in one line.
        trace: the traceback; may be empty.
    """

    def __init__(self, found: str, trace: str = "") -> None:
        super().__init__(
            found, todo="this is a fault of porter; --traceback shows where"
        )
        self.trace = trace
