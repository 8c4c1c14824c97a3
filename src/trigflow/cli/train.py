"""`trigflow train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trigflow.data.config import DataConfig
from trigflow.networks import NetworkConfig, UNetConfig
from trigflow.objectives import Diffusion, Objective
from trigflow.process import TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.training.config import (
    EMAConfig,
    GuardConfig,
    LoopConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
)


@dataclass(frozen=True)
class Train:
    """Train a diffusion teacher (or, with an sct preset, a student from scratch) on digits, mnist or your own images.

    Example: trigflow train --data photos/ --resize 32 --out runs/teacher
    """

    out: Path
    """Run folder to create (or, with --resume, to go on with)."""
    preset: str = "auto"
    """Starting point of all settings, see trigflow recipes; auto chooses by the data. Every other option overrides it."""
    resume: Literal["no", "yes", "auto"] = "no"
    """yes, or --resume alone: go on from the newest checkpoint in the run folder; one that is damaged is an error. auto: from
    the newest that is sound, or anew where there is none, for scripts that are started again and again."""
    dry: bool = False
    """Print every setting with where it is from (defaults, preset, teacher, command line, data), and train nothing."""
    quiet: bool = False
    """No progress bars."""
    data: DataConfig = field(default_factory=DataConfig)
    process: TrigFlow = field(default_factory=TrigFlow)
    network: NetworkConfig = field(default_factory=UNetConfig)
    objective: Objective = field(default_factory=Diffusion)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def run(self) -> None:
        from trigflow.cli.dry import as_kind_of, print_settings
        from trigflow.lab.recipes import preset, require_data
        from trigflow.training.runs import train
        from trigflow.training.saving import RESUME

        if self.objective.distills:
            raise UserError(
                "train without a teacher cannot distill; expected diffusion, sct, ct or meanflow; use: trigflow distill RUN"
            )
        require_data(self.data.source)
        config = RunConfig(
            self.data, self.process, self.network, self.objective,
            self.optimizer, self.ema, self.loop, self.parallel, self.guard,
        )  # fmt: skip
        if self.dry:
            print_settings(
                config, self.out, **{f"preset {self.preset}": as_kind_of(preset(self.preset, "train"), config)}
            )
            return
        train(config, self.out, resume=RESUME[self.resume], progress=not self.quiet)
        print(f"Trained. Draw with: trigflow sample {self.out}; distill with: trigflow distill {self.out} --out RUN")
