"""`trigflow info`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Info:
    """Say what a run folder holds: model, data, settings, how training went.

    Example: trigflow info runs/demo
    """

    run_folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder."""
    json: bool = False
    """Print JSON instead of text."""

    def run(self) -> None:
        from trigflow.training.describe import describe_run

        print(describe_run(self.run_folder, as_json=self.json))
