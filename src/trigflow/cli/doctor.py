"""`trigflow doctor`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Doctor:
    """Say what is wrong with a training, finished or not, with the evidence and the setting to change.

    Exit code 0 when nothing was found, 1 when something was.

    Example: trigflow doctor runs/demo
    """

    run_folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder."""
    json: bool = False
    """Print JSON instead of text."""

    def run(self) -> None:
        import json

        from trigflow.lab.doctor import examine

        examination = examine(self.run_folder)
        print(json.dumps(examination.facts(), indent=2) if self.json else examination.text())
        if examination.diagnoses:
            sys.exit(1)
