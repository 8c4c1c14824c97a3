"""Errors that a user can act on.

Every one of them says three things in one line: what was wrong, what was expected, and what to do. The command line prints
that line and leaves with exit code 2; from Python it is an ordinary exception.
"""

from __future__ import annotations


class UserError(ValueError):
    """Input that cannot be used as given: a bad argument, file, folder or configuration."""


class MissingExtraError(UserError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    def __init__(self, purpose: str, package: str, extra: str) -> None:
        super().__init__(
            f"{purpose} needs {package}, which is not installed; expected the '{extra}' extra; "
            f'run: pip install "trigflow[{extra}]"'
        )
