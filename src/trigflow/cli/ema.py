"""`trigflow ema`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Ema:
    """Average the weights of a run over another length than it was trained with, from its snapshots.

    The run must have been trained with `--ema.snapshot-every N`. Writes a folder that every other command takes.

    Example: trigflow ema runs/teacher --sigma-rel 0.07 --out runs/teacher-0.07
    """

    run_folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder, finished or not."""
    sigma_rel: float
    """Length of the average relative to the training, in (0, 0.28)."""
    iteration: int | None = None
    """Iteration at which the average ends; by default the last snapshot's. Best is one that has a snapshot."""
    out: Path | None = None
    """Folder to create; by default RUN/ema/<iteration>-<sigma_rel>."""
    quiet: bool = False
    """No progress bar."""

    def run(self) -> None:
        from trigflow.runtime.places import check_place
        from trigflow.training.posthoc import LARGE_ERROR, choose_snapshots, reconstruct

        iteration = choose_snapshots(self.run_folder, self.sigma_rel, self.iteration)[2]
        out = self.out or self.run_folder / "ema" / f"{iteration:08d}-{self.sigma_rel:g}"
        check_place(out, "new folder")
        result = reconstruct(self.run_folder, self.sigma_rel, iteration=iteration, progress=not self.quiet)
        result.save(out)
        count, error = len(result.snapshots), result.fit.error
        print(
            f"{out}: sigma_rel {self.sigma_rel:g} at iteration {iteration}, from {count} snapshots; expected error "
            f"{error:.1e} of the distance the weights have moved"
        )
        if error > LARGE_ERROR:
            print(
                f"trigflow: warning: an expected error of {error:.1e} is large; expected at most {LARGE_ERROR:g}; train with "
                "a lower ema.snapshot_every or ema.sigma_rels nearer to the length, or end at the iteration of a snapshot",
                file=sys.stderr,
            )
