"""The command line in one of several processes, see `group.py`; its arguments are FOLDER and those of the command."""

from __future__ import annotations

import faulthandler
import sys

import torch

from trigflow import cli


def main() -> None:
    faulthandler.dump_traceback_later(240, exit=True)  # a process that waits for ever says where
    torch.set_num_threads(1)
    cli.main(sys.argv[2:])
