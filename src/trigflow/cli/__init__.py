"""The command `trigflow`: `entry` parses and calls, and every command is a dataclass, in one file for each room."""

import gc

collecting = gc.isenabled()
gc.disable()  # to look for garbage among what is imported takes a third of the time until `trigflow --help` answers
from trigflow.cli.entry import main  # noqa: E402

if collecting:
    gc.enable()

__all__ = ["main"]
