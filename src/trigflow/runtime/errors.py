"""Errors that a user can act on.

Every one of them says three things in one line: what was wrong, what was expected, and what to do. The command line prints
that line and leaves with exit code 2; from Python it is an ordinary exception.
"""

from collections.abc import Callable, Mapping

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


def first_line(error: object) -> str:
    """What an error says in its first line, without a full stop; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def on_one_line(error: object, most: int = 200) -> str:
    """All that an error says, on one line and cut where it is long; its class where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def shortened(path: object) -> str:
    """A path as messages show it: of a long one the beginning and the end."""
    shown = str(path)
    return shown if len(shown) <= 100 else f"{shown[:60]}...{shown[-30:]}"


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], object]:
    """The `__getattr__` of a module some of whose names have gone: an old one raises an ImportError with what it is now.

    Args:
        module: its name.
        names: from old ones to how they are spelled now.
    """

    def find(name: str) -> object:
        if name in names:
            raise ImportError(f"{module}.{name} is now {names[name]}; use it by that name")
        raise AttributeError(f"module '{module}' has no attribute '{name}'")

    return find
