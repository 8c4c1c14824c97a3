"""One dataclass a command: its fields are the options, its docstring the help, `run` does the work.

What a command needs beyond parsing is imported when it runs, so that `trigflow --help` answers at once.
"""

from __future__ import annotations

from trigflow.commands.bench import Bench
from trigflow.commands.checkpoint import Checkpoint
from trigflow.commands.convert import Convert
from trigflow.commands.data import Data
from trigflow.commands.demo import Demo
from trigflow.commands.distill import Distill
from trigflow.commands.doctor import Doctor
from trigflow.commands.ema import Ema
from trigflow.commands.encode import Encode
from trigflow.commands.evaluate import Evaluate
from trigflow.commands.export import Export
from trigflow.commands.import_ import Import
from trigflow.commands.info import Info
from trigflow.commands.plan import Plan
from trigflow.commands.recipes import Recipes
from trigflow.commands.reference import Reference
from trigflow.commands.sample import Sample
from trigflow.commands.serve import Serve
from trigflow.commands.study import Study
from trigflow.commands.train import Train

Command = (
    Demo
    | Train
    | Distill
    | Sample
    | Serve
    | Evaluate
    | Reference
    | Data
    | Encode
    | Ema
    | Import
    | Convert
    | Checkpoint
    | Export
    | Info
    | Doctor
    | Recipes
    | Plan
    | Bench
    | Study
)
COMMANDS: dict[str, type[Command]] = {
    "demo": Demo,
    "train": Train,
    "distill": Distill,
    "sample": Sample,
    "serve": Serve,
    "evaluate": Evaluate,
    "reference": Reference,
    "data": Data,
    "encode": Encode,
    "ema": Ema,
    "import": Import,
    "convert": Convert,
    "checkpoint": Checkpoint,
    "export": Export,
    "info": Info,
    "doctor": Doctor,
    "recipes": Recipes,
    "plan": Plan,
    "bench": Bench,
    "study": Study,
}
"""From the name on the command line to its command."""

__all__ = [
    "COMMANDS",
    "Bench",
    "Checkpoint",
    "Command",
    "Convert",
    "Data",
    "Demo",
    "Distill",
    "Doctor",
    "Ema",
    "Encode",
    "Evaluate",
    "Export",
    "Import",
    "Info",
    "Plan",
    "Recipes",
    "Reference",
    "Sample",
    "Serve",
    "Study",
    "Train",
]
