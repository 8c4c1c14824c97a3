"""One dataclass a command: its fields are the options, its docstring the help, `run` does the work.

What a command needs beyond parsing is imported when it runs, so that `trigflow --help` answers at once.
"""

from typing import Protocol

from trigflow.cli.data import Data, Encode
from trigflow.cli.evaluation import Evaluate, Reference
from trigflow.cli.lab import Demo, Doctor, Plan, Recipes
from trigflow.cli.models import Bench, Export, Import, Sample, Serve
from trigflow.cli.training import Checkpoint, Convert, Distill, Ema, Info, Train


class Command(Protocol):
    """What a command line becomes."""

    def run(self) -> None:
        """Do it, and print what came of it."""


COMMANDS: dict[str, type[Command]] = {
    command.__name__.lower(): command
    for command in (
        Demo, Train, Distill, Sample, Serve, Evaluate, Reference, Data, Encode, Ema, Import, Convert, Checkpoint, Export,
        Info, Doctor, Recipes, Plan, Bench,
    )
}  # fmt: skip
"""From the name on the command line to its command."""
