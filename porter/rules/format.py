"""Formats the statements that a rule emits, and nothing else.

The width is upstream's, not ours: edited lines then break where upstream's do and the
diff stays small.
"""

from __future__ import annotations

import black
from black.mode import TargetVersion
from black.parsing import InvalidInput

from porter.errors import PorterError

UPSTREAM_LINE_LENGTH = 119
INDENT = "    "


def format_statements(text: str, indentation: str) -> str:
    """Formats statements written at column 0 and indents them.

    Returns:
        The statements without a newline at the end.

    Raises:
        PorterError: the text is not Python, a slip of the rule that wrote it.
    """
    mode = black.Mode(
        line_length=UPSTREAM_LINE_LENGTH - len(indentation),
        target_versions={TargetVersion.PY311},
    )
    try:
        return indent_block(black.format_str(text, mode=mode), indentation)
    except InvalidInput as error:
        raise PorterError(
            f"emitted text that is no Python: {text.splitlines()[0]!r}"
        ) from error


def format_header(text: str, indentation: str) -> str:
    """Formats a compound statement's header, such as `for x in y:`."""
    filler = "pass"
    body = format_statements(f"{text}\n{INDENT}{filler}\n", indentation)
    return body[: body.rindex("\n")]


def indent_block(text: str, indentation: str) -> str:
    """Indents every line that holds text; drops the newline at the end."""
    lines = text.rstrip("\n").split("\n")
    return "\n".join(indentation + line if line.strip() else "" for line in lines)
