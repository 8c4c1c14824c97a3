"""Errors that a user can act on.

Every one of them says three things in one line: what was wrong, what was expected, and what to do. The command line prints
that line and leaves with exit code 2; from Python it is an ordinary exception.
"""

from __future__ import annotations

EXIT_FAILED = 2
"""Exit code for input that cannot be used, with one line on stderr."""
EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGINT, 128 + 2 as shells count: what was reached is saved."""
EXIT_TERMINATED = 143
"""Exit code after SIGTERM, 128 + 15, as schedulers send it before they take a machine away: what was reached is saved."""


class UserError(ValueError):
    """Input that cannot be used as given: a bad argument, file, folder or configuration."""


class DivergedError(UserError):
    """A training whose numbers went wrong more often than it may go back for."""


class MissingExtraError(UserError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    def __init__(self, purpose: str, package: str, extra: str) -> None:
        super().__init__(
            f"{purpose} needs {package}, which is not installed; expected the '{extra}' extra; "
            f'run: pip install "trigflow[{extra}]"'
        )
