"""One dataclass a command: its fields are the options, its docstring the help, `run` does the work.

What a command needs beyond parsing is imported when it runs, so that `trigflow --help` answers at once.
"""

from __future__ import annotations

from typing import Protocol

from trigflow.cli.bench import Bench
from trigflow.cli.checkpoint import Checkpoint
from trigflow.cli.convert import Convert
from trigflow.cli.demo import Demo
from trigflow.cli.distill import Distill
from trigflow.cli.ema import Ema
from trigflow.cli.encode import Encode
from trigflow.cli.evaluate import Evaluate
from trigflow.cli.export import Export
from trigflow.cli.import_ import Import
from trigflow.cli.reference import Reference
from trigflow.cli.reports import Data, Doctor, Info, Plan, Recipes
from trigflow.cli.sample import Sample
from trigflow.cli.serve import Serve
from trigflow.cli.study import Study
from trigflow.cli.train import Train


class Command(Protocol):
    """What a command line becomes."""

    def run(self) -> None:
        """Do it, and print what came of it."""


COMMANDS: dict[str, type[Command]] = {
    command.__name__.lower(): command
    for command in (
        Demo, Train, Distill, Sample, Serve, Evaluate, Reference, Data, Encode, Ema, Import, Convert, Checkpoint, Export,
        Info, Doctor, Recipes, Plan, Bench, Study,
    )
}  # fmt: skip
"""From the name on the command line to its command."""
