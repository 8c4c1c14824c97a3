"""The command `trigflow`: `entry` parses and calls, and every command is a dataclass, in one file for each room."""

from trigflow.cli.entry import main

__all__ = ["main"]
