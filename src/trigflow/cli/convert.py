"""`trigflow convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Convert:
    """Give a teacher with log time or Fourier features (as imported) the time embedding that distillation is stable with.

    Keeps the weights, fits the new time embedding to the old one, trains a little further with the diffusion loss, and
    reports how far the velocity moved. Writes a run folder with `convert.json`.

    Example: trigflow convert runs/edm2-s --data imagenet.zip --out runs/teacher
    """

    run_folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder of the teacher."""
    out: Path
    """Run folder to create."""
    data: str | None = None
    """Other data than the run was trained on: digits, mnist, a folder or a zip."""
    iterations: int = 2000
    """Optimizer steps of the fine-tuning; 0 for none."""
    lr: float = 1e-4
    """Learning rate of the fine-tuning: after a short warmup a cosine to zero."""
    batch_size: int = 128
    """Samples per optimizer step of the fine-tuning."""
    fit_iterations: int = 1000
    """Steps of the fit of the time embedding, which needs no data; 0 for its closed form alone."""
    modulation: Literal["keep", "double"] = "keep"
    """keep: as the teacher has it. double: adaptive double normalization in place of EDM2's gain or DDPM++'s addition."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the fine-tuning."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    resume: bool = False
    """Go on with a fine-tuning that was interrupted, with the same settings."""
    quiet: bool = False
    """No progress bar."""

    def run(self) -> None:
        from trigflow.training.convert import ConvertSettings, convert

        settings = ConvertSettings(
            iterations=self.iterations,
            lr=self.lr,
            batch_size=self.batch_size,
            fit_iterations=self.fit_iterations,
            modulation=self.modulation,
            precision=self.precision,
            seed=self.seed,
        )
        result = convert(
            self.run_folder,
            self.out,
            settings,
            data=self.data,
            device=self.device,
            resume=self.resume,
            progress=not self.quiet,
        )
        print(result.table())
        print(f"\nConverted. Distill with: trigflow distill {self.out} --out RUN")
