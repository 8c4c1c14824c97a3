"""The command `trigflow`: `entry` parses and calls, and every command is a dataclass, in one file for each room."""

import gc

_collecting = gc.isenabled()
gc.disable()  # what is being imported stays: to look for garbage in it takes a good part of the time until a command starts
try:
    from trigflow.cli.entry import main
finally:
    if _collecting:
        gc.enable()

__all__ = ["main"]
