"""The command `trigflow`: parses, calls, prints. Everything it does can be done from Python in as many lines."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import operator
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import tyro
from tyro import MISSING, MISSING_NONPROP
from tyro.conf import Positional, arg, subcommand

from trigflow.errors import UserError
from trigflow.files import read_json
from trigflow.networks import UNetConfig
from trigflow.process import TrigFlow
from trigflow.recipes import get_recipe, recipe_for
from trigflow.training.config import (
    DataConfig,
    EMAConfig,
    LoopConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
    from_dict,
)


@dataclass(frozen=True)
class Demo:
    """Train a diffusion teacher on real handwritten digits, distill it into a two-step student, and show both.

    Writes a run folder: the student, `teacher/`, pictures, `report.json` and `report.html`. A few minutes on two CPU cores.

    Example: trigflow demo --out runs/demo --seed 0
    """

    out: Path = Path("runs/demo")
    """Folder to create. An interrupted demo there goes on, a finished one shows its report; anything else is left alone."""
    seed: int = 0
    """Seed of everything random."""
    quick: bool = False
    """A tiny demo of a few seconds, to try the installation; the pictures are not worth looking at."""
    quiet: bool = False
    """No progress bars."""

    def run(self) -> None:
        from trigflow.demo import run_demo

        report = run_demo(self.out, seed=self.seed, quick=self.quick, progress=not self.quiet)
        print(report.table())
        print(
            f"\nOpen {self.out / 'report.html'}; draw more with: trigflow sample {self.out} --num 100 --out digits.png"
        )


@dataclass(frozen=True)
class Train:
    """Train a diffusion teacher, on digits, mnist or your own images.

    Example: trigflow train --data photos/ --resize 32 --out runs/teacher
    """

    out: Path
    """Run folder to create (or, with --resume, to go on with)."""
    preset: str = "auto"
    """Starting point of all settings; auto chooses by the data. Every other option overrides it."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder."""
    quiet: bool = False
    """No progress bars."""
    data: DataConfig = field(default_factory=DataConfig)
    process: TrigFlow = field(default_factory=TrigFlow)
    network: UNetConfig = field(default_factory=UNetConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def run(self) -> None:
        from trigflow.training.trainer import train

        if self.objective.kind == "scd":
            raise UserError(
                "train without a teacher cannot distill; expected diffusion or sct; use: trigflow distill RUN"
            )
        config = RunConfig(self.data, self.process, self.network, self.objective, self.optimizer, self.ema, self.loop)
        train(config, self.out, resume=self.resume, progress=not self.quiet)
        print(f"Trained. Draw with: trigflow sample {self.out}; distill with: trigflow distill {self.out} --out RUN")


@dataclass(frozen=True)
class Distill:
    """Turn a teacher into a student that draws in one or two steps (sCD), starting from the teacher's weights.

    Data and network are the teacher's. `--objective.kind sct` trains on the data alone, only starting from the teacher.

    Example: trigflow distill runs/teacher --out runs/student
    """

    teacher: Positional[Path]
    """Run folder of the teacher."""
    out: Path
    """Run folder to create (or, with --resume, to go on with)."""
    preset: str = "auto"
    """Starting point of all settings; auto chooses by the teacher's data. Every other option overrides it."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder."""
    quiet: bool = False
    """No progress bars."""
    data: Annotated[str | None, arg(name="data")] = None
    """Other data than the teacher was trained on: digits, mnist, a folder or a zip."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def run(self) -> None:
        from trigflow.model import load
        from trigflow.training.trainer import distill

        if self.objective.kind == "diffusion":
            raise UserError("distill with the diffusion objective; expected scd or sct; use: trigflow train")
        teacher = load(self.teacher, self.loop.device)
        config = dataclasses.replace(
            teacher.config,
            objective=self.objective, optimizer=self.optimizer, ema=self.ema, loop=self.loop, teacher=str(self.teacher),
        )  # fmt: skip
        if self.data is not None:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=self.data))
        distill(config, teacher, self.out, resume=self.resume, progress=not self.quiet)
        print(f"Distilled. Draw with: trigflow sample {self.out} --steps 2")


@dataclass(frozen=True)
class Sample:
    """Draw images from a run folder: a grid, or single files.

    Example: trigflow sample runs/demo --steps 2 --labels 3 7 --num 64 --out grid.png
    """

    run_folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder of a teacher or a student."""
    out: Path = Path("samples.png")
    """A file (.png, .webp, .jpg) for a grid; anything else is a folder that gets one PNG per image."""
    steps: int | None = None
    """Evaluations of a student (default 2), or solver steps of a teacher (default 18, that is 35 evaluations)."""
    guidance: float = 1.0
    """Guidance scale; 1 for none."""
    labels: tuple[int, ...] = ()
    """Classes to draw, in turn; all of them by default."""
    seed: int = 0
    """Seed; the same seed starts every model from the same noise."""
    num: int = 64
    """Number of images."""
    columns: int | None = None
    """Images per row of a grid."""
    solver: str = "heun"
    """Solver of a teacher: heun, dpm2s, dpm++2m or ddim."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    quiet: bool = False
    """No progress bar."""

    def run(self) -> None:
        from trigflow.images import check_ending, save_grid, save_images
        from trigflow.model import load

        if self.out.suffix:
            check_ending(self.out)
        images = load(self.run_folder, self.device).sample(
            self.num,
            steps=self.steps,
            labels=self.labels or None,
            guidance=self.guidance,
            seed=self.seed,
            solver=self.solver,
            progress=not self.quiet,
        )
        if self.out.suffix:
            print(save_grid(images, self.out, self.columns))
        else:
            print(f"{len(save_images(images, self.out))} images in {self.out}")


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
        if self.out is not None:
            ensure_folder(self.out.parent)
        result = evaluate_model(
            model,
            num=self.num,
            steps=self.steps,
            guidance=self.guidance,
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
        from trigflow.evaluation import describe_run

        print(describe_run(self.run_folder, as_json=self.json))


Command = Demo | Train | Distill | Sample | Evaluate | Info
COMMANDS = {"demo": Demo, "train": Train, "distill": Distill, "sample": Sample, "evaluate": Evaluate, "info": Info}


def main(args: list[str] | None = None) -> None:
    """Entry point: exit code 0, 2 for input that cannot be used (one line on stderr), 130 when interrupted."""
    given = list(sys.argv[1:] if args is None else args)
    try:
        _parse(given).run()
    except UserError as error:
        print(f"trigflow: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("trigflow: interrupted; what was saved can be resumed", file=sys.stderr)
        sys.exit(130)


def _parse(given: list[str]) -> Command:
    """The command with its options. The defaults of train and distill come from a preset, which is looked up first."""
    defaults: dict[str, Any] = {}
    if given[:1] == ["train"]:
        name = _preset(given, _option(given, "--data", _option(given, "--data.source", "digits")))
        recipe = get_recipe(name).teacher
        defaults["train"] = Train(
            MISSING, name, data=recipe.data, process=recipe.process, network=cast(UNetConfig, recipe.network),
            objective=recipe.objective, optimizer=recipe.optimizer, ema=recipe.ema, loop=recipe.loop,
        )  # fmt: skip
    elif given[:1] == ["distill"]:
        name = _preset(given, _trained_on(given))
        recipe = get_recipe(name).student
        defaults["distill"] = Distill(
            MISSING, MISSING, name, objective=recipe.objective, optimizer=recipe.optimizer, ema=recipe.ema, loop=recipe.loop
        )  # fmt: skip
    commands: Any = [
        Annotated[command, subcommand(name, default=defaults.get(name, MISSING_NONPROP))]
        for name, command in COMMANDS.items()
    ]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            command: Command = tyro.cli(
                functools.reduce(operator.or_, commands),
                prog="trigflow",
                description="Turn any diffusion or flow model into one that draws in one or two steps.",
                args=given,
            )
    except SystemExit as stop:
        if stop.code == 2:
            raise UserError(_one_line(printed.getvalue(), given)) from None
        raise
    return command


def _one_line(box: str, given: list[str]) -> str:
    """The error that tyro draws as a box of several lines, in one: its text up to the first rule."""
    title, *lines = [line.strip("╭╮╰╯│─ ") for line in box.splitlines()]
    text = f"{title.lower()}: {' '.join(itertools.takewhile(bool, lines))}"
    command = f"trigflow {given[0]} --help" if given and given[0] in COMMANDS else "trigflow --help"
    return f"{text.rstrip('.:')}; expected options as in '{command}'; correct the command line"


def _preset(given: list[str], data: str) -> str:
    """The preset named on the command line, or the one that suits the data."""
    named = _option(given, "--preset", "auto")
    return recipe_for(data) if named == "auto" else named


def _option(given: list[str], name: str, default: str) -> str:
    """Value of `name VALUE` or `name=VALUE` among the arguments."""
    for i, word in enumerate(given):
        if word == name and i + 1 < len(given):
            return given[i + 1]
        if word.startswith(f"{name}="):
            return word.split("=", 1)[1]
    return default


def _trained_on(given: list[str]) -> str:
    """Data source of the first run folder among the arguments: that of the teacher."""
    for word in given:
        config = Path(word) / "config.json"
        if config.is_file():
            return from_dict(read_json(config, "configuration")).data.source
    return "digits"
