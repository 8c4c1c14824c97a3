"""`trigflow distill`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from trigflow.objectives import Diffusion, Objective
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
class Distill:
    """Turn a teacher into a student that draws in one or two steps (sCD), starting from the teacher's weights.

    Data and network are the teacher's. `--objective.kind` chooses the loss: scd, vsd, scd-vsd (their sum), cd or
    meanflow-distill; or sct, ct or meanflow, which learn from the data alone and only start from the teacher. `--from` starts
    from a student instead.

    Example: trigflow distill runs/teacher --out runs/student
    """

    teacher: Positional[Path]
    """Run folder of the teacher."""
    out: Path
    """Run folder to create (or, with --resume, to go on with)."""
    preset: str = "auto"
    """Starting point of all settings, see trigflow recipes; auto chooses by the teacher's data. Other options override it."""
    resume: Literal["no", "yes", "auto"] = "no"
    """yes, or --resume alone: go on from the newest checkpoint in the run folder; one that is damaged is an error. auto: from
    the newest that is sound, or anew where there is none, for scripts that are started again and again."""
    dry: bool = False
    """Print every setting with where it is from (defaults, preset, teacher, command line, data), and train nothing."""
    quiet: bool = False
    """No progress bars."""
    start: Annotated[Path | None, arg(name="from", metavar="RUN")] = None
    """Run folder of a student of this teacher to start from; the paper's scd-vsd starts from an scd student."""
    negative: Annotated[Path | None, arg(metavar="RUN")] = None
    """Run folder of a worse teacher (smaller, or trained for less time) to guide the teacher away from; by default the
    teacher without the class. For `--objective.guidance-max` above 1."""
    data: Annotated[str | None, arg(name="data")] = None
    """Other data than the teacher was trained on: digits, mnist, a folder or a zip."""
    dropout: float | None = None
    """Dropout of the student's network; by default that of the preset or else of the teacher."""
    dropout_up_to: int | None = None
    """With dropout: the largest resolution that has it, for an EDM2 network; by default every one."""
    objective: Objective = field(default_factory=Diffusion)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def run(self) -> None:
        from trigflow.cli.dry import as_kind_of, print_settings
        from trigflow.data.config import data_of
        from trigflow.lab.recipes import RUNS, preset, require_data
        from trigflow.models.model import load
        from trigflow.runtime.places import check_place
        from trigflow.training.runs import distill, with_dropout_of
        from trigflow.training.saving import RESUME

        if self.objective.kind == "diffusion":
            raise UserError(
                "distill with the diffusion objective; expected that of a student, such as scd; use: trigflow train"
            )
        check_place(self.out, "folder")
        device = "cpu" if self.parallel.mode == "fsdp" else self.loop.device  # sharded from there, block by block
        teacher = load(self.teacher, device)
        start = None if self.start is None else load(self.start, device)
        negative = None if self.negative is None else load(self.negative, self.loop.device)
        config = RunConfig(
            data_of(teacher.origin), teacher.process, teacher.spec,
            objective=self.objective, optimizer=self.optimizer, ema=self.ema, loop=self.loop,
            parallel=self.parallel, guard=self.guard, teacher=str(self.teacher),
            start=None if self.start is None else str(self.start),
            negative=None if self.negative is None else str(self.negative),
        )  # fmt: skip
        if self.data is not None:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=self.data))
        if self.dropout is not None:
            dropped = {"dropout": self.dropout, "dropout_up_to": self.dropout_up_to}
            settings: dict[str, Any] = {n: value for n, value in dropped.items() if hasattr(config.network, n)}
            config = dataclasses.replace(config, network=config.network.changed(**settings))
        require_data(config.data.source)
        if self.dry:
            named = as_kind_of(preset(self.preset, "distill"), config)
            given = dataclasses.replace(
                named, data=data_of(teacher.origin), process=teacher.process,
                network=with_dropout_of(named.network, teacher.spec) if self.preset in RUNS else teacher.spec,
                teacher=config.teacher,
            )  # fmt: skip
            print_settings(config, self.out, **{f"preset {self.preset}": named, "teacher": given})
            return
        student = distill(
            config,
            teacher,
            self.out,
            start=start,
            negative=negative,
            resume=RESUME[self.resume],
            progress=not self.quiet,
        )
        print(f"Distilled. Draw with: trigflow sample {self.out} --steps {student.default_steps()}")
