"""`trigflow data`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Data:
    """Read a whole data set and say what is wrong with it, one line each.

    Exit code 0 when nothing was found, 1 when something was, 2 when it cannot be read at all.

    Example: trigflow data check photos/ --resize 64
    """

    action: Annotated[Positional[Literal["check"]], arg(metavar="check")]
    """What to do: check."""
    path: Annotated[Positional[str], arg(metavar="PATH")]
    """Folder, zip, tar, folder of tars, or hf:NAME, of images or latents."""
    resize: int | None = None
    """Images may be of any size, as in training with --resize N."""
    like: Annotated[Path | None, arg(metavar="RUN")] = None
    """Also compare size, classes, mean and deviation with the data that this run was trained on."""
    limit: int = 20
    """Lines of one kind; 0 for all."""
    workers: int = 0
    """Processes that read and decode."""
    json: bool = False
    """Print JSON instead of text."""
    quiet: bool = False
    """No progress bar."""

    def run(self) -> None:
        import json

        from trigflow.data.check import check_data

        progress = not self.quiet and sys.stderr.isatty()
        report = check_data(self.path, resize=self.resize, like=self.like, workers=self.workers, progress=progress)
        print(json.dumps(report.facts(), indent=2) if self.json else report.text(self.limit))
        if report.problems:
            sys.exit(1)
