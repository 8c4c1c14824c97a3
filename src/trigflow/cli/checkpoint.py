"""`trigflow checkpoint`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from trigflow.runtime.errors import UserError


@dataclass(frozen=True)
class Checkpoint:
    """List and check the checkpoints of a run, or make a model folder of one, however many files it has.

    The folder has the averaged network, as at the end of a run: for trigflow sample, evaluate, distill and the rest. The run
    may still be going on.

    Example: trigflow checkpoint runs/teacher --out runs/teacher-so-far
    """

    run_folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder."""
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder to create; without it, checkpoints are listed and their checksums compared."""
    at: int | None = None
    """Iteration of the checkpoint; by default the newest."""
    everything: bool = False
    """Write state.safetensors too: weights, averages and optimizer moments as whole tensors in a single file."""

    def run(self) -> None:
        from trigflow.training.consolidate import consolidate, describe_checkpoints

        if self.out is None:
            if self.at is not None or self.everything:
                raise UserError("--at or --everything without --out; expected a folder to write; add --out DIR")
            print(describe_checkpoints(self.run_folder))
            return
        path = consolidate(self.run_folder, self.out, at=self.at, everything=self.everything)
        print(f"Made of iteration {int(path.name)}. Draw with: trigflow sample {self.out}")
