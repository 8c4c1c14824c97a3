"""`trigflow demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Demo:
    """Train a diffusion teacher on real handwritten digits, distill it into a two-step student, and show both.

    Writes a run folder: the student, `teacher/`, pictures, `report.json` and `report.html`. A few minutes on two CPU cores;
    with the recipe mnist, whose images have twelve times the pixels, within the hour.

    Example: trigflow demo --out runs/demo --seed 0
    """

    out: Path = Path("runs/demo")
    """Folder to create. An interrupted demo there goes on, a finished one shows its report; anything else is left alone."""
    recipe: str = "digits"
    """`digits` (8x8, comes with the installation) or `mnist` (28x28, needs the extra `mnist`)."""
    seed: int = 0
    """Seed of everything random."""
    quick: bool = False
    """A tiny demo of a few seconds, to try the installation; the pictures are not worth looking at."""
    quiet: bool = False
    """No progress bars."""

    def run(self) -> None:
        from trigflow.lab.demo import run_demo

        report = run_demo(self.out, recipe=self.recipe, seed=self.seed, quick=self.quick, progress=not self.quiet)
        print(report.table())
        print(
            f"\nOpen {self.out / 'report.html'}; draw more with: trigflow sample {self.out} --num 100 --out digits.png"
        )
