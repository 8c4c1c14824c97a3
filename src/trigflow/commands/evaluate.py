"""`trigflow evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Evaluate:
    """Measure a run: Frechet distance, precision and recall against its data, beside the distance of real from real.

    Example: trigflow evaluate runs/demo --steps 2 --num 2000
    """

    run_folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder of a teacher or a student."""
    num: int = 2000
    """Samples to draw."""
    steps: int | None = None
    """As in `trigflow sample`."""
    guidance: float = 1.0
    """Guidance scale; 1 for none."""
    guidance_interval: tuple[float, float] | None = None
    """As in `trigflow sample`."""
    negative: Annotated[Path | None, arg(metavar="RUN")] = None
    """As in `trigflow sample`."""
    solver: str = "heun"
    """Solver of a teacher."""
    seed: int = 0
    """Seed of the samples."""
    features: str = "auto"
    """Feature network: digits, mnist or pixels; auto chooses by the data."""
    data: str | None = None
    """Other data than the run was trained on."""
    out: Path | None = None
    """Also write the figures to this JSON file."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    quiet: bool = False
    """No progress bar."""

    def run(self) -> None:
        from trigflow.evaluation import evaluate_model
        from trigflow.files import ensure_folder, write_json
        from trigflow.model import load

        model = load(self.run_folder, self.device)
        negative = None if self.negative is None else load(self.negative, self.device)
        if self.out is not None:
            ensure_folder(self.out.parent)
        result = evaluate_model(
            model,
            num=self.num,
            steps=self.steps,
            guidance=self.guidance,
            guidance_interval=self.guidance_interval,
            negative=negative,
            solver=self.solver,
            seed=self.seed,
            features=self.features,
            data=self.data,
            progress=not self.quiet,
        )
        if self.out is not None:
            write_json(self.out, result)
        for name, value in result.items():
            print(f"{name:24} {value:.4f}" if isinstance(value, float) else f"{name:24} {value}")
