"""The command `trigflow`: `entry` parses and calls, and every command is a dataclass: those that only look in `reports`,
the others in files of their own."""

from trigflow.cli.entry import main

__all__ = ["main"]
