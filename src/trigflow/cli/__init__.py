"""The command `trigflow`: `entry` parses and calls, and every command is a dataclass in a file of its own."""

from trigflow.cli.entry import main

__all__ = ["main"]
