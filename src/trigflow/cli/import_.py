"""`trigflow import`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Import:
    """Turn a network snapshot of EDM or EDM2 (.pkl) into a run folder, and say what it holds. Nothing in the file is run.

    Example: trigflow import edm2-img512-s-2147483-0.025.pkl --out runs/edm2-s
    """

    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """Snapshot as NVIDIA publishes it, or as post-hoc EMA writes it."""
    out: Path
    """Run folder to create."""

    def run(self) -> None:
        from trigflow.models.pretrained import import_snapshot

        for name, value in import_snapshot(self.file, self.out).items():
            print(f"{name:14} {value}")
        print(f"Imported. Draw with: trigflow sample {self.out}; distill with: trigflow distill {self.out} --out RUN")
