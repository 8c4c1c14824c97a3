"""Commands that look at something and say what they find: `trigflow info`, `doctor`, `data`, `recipes` and `plan`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


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
        from trigflow.training.describe import describe_run

        print(describe_run(self.run_folder, as_json=self.json))


@dataclass(frozen=True)
class Doctor:
    """Say what is wrong with a training, finished or not, with the evidence and the setting to change.

    Exit code 0 when nothing was found, 1 when something was.

    Example: trigflow doctor runs/demo
    """

    run_folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder."""
    json: bool = False
    """Print JSON instead of text."""

    def run(self) -> None:
        from trigflow.lab.doctor import examine

        examination = examine(self.run_folder)
        print(json.dumps(examination.facts(), indent=2) if self.json else examination.text())
        if examination.diagnoses:
            sys.exit(1)


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
        from trigflow.data.check import check_data

        progress = not self.quiet and sys.stderr.isatty()
        report = check_data(self.path, resize=self.resize, like=self.like, workers=self.workers, progress=progress)
        print(json.dumps(report.facts(), indent=2) if self.json else report.text(self.limit))
        if report.problems:
            sys.exit(1)


@dataclass(frozen=True)
class Recipes:
    """List the presets for train and distill, or show all settings of one.

    Example: trigflow recipes img512-xl-scd
    """

    name: Annotated[Positional[str | None], arg(metavar="NAME")] = None
    """Recipe to show in full; all of them are listed without it."""
    json: bool = False
    """Print JSON instead of text."""

    def run(self) -> None:
        from trigflow.lab.recipes.listing import as_lines, as_table, list_recipes, show

        if self.name is not None:
            recipe = show(self.name)
            print(json.dumps(recipe, indent=2) if self.json else "\n".join(as_lines(recipe)))
        else:
            recipes = list_recipes()
            print(json.dumps(recipes, indent=2) if self.json else as_table(recipes))


@dataclass(frozen=True)
class Plan:
    """Say what a recipe takes before it is started: operations, memory on each GPU, hours. Needs no GPU.

    Example: trigflow plan img512-xxl-scd --gpus 64 --gpu h100
    """

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """Name of a recipe, see trigflow recipes."""
    gpus: int = 1
    """Number of GPUs."""
    batch_gpu: int | None = None
    """Samples on each GPU at a time; by default the most that fit and divide the batch."""
    gpu: str = "h100"
    """a100-40g, a100-80g, h100, h200, b200, l4, l40s, rtx4090 or mi300x."""
    utilization: float = 0.4
    """Share of the GPU's peak rate that training reaches; the hours depend on it."""
    memory: float | None = None
    """GiB of memory of a GPU, in place of what the named one has."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """ddp: everything on each GPU. fsdp2: weights, gradients, moments and averages sharded."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """In place of the recipe's."""
    checkpointing: bool = False
    """Blocks are computed again in the backward pass instead of kept."""
    json: bool = False
    """Print JSON instead of text."""

    def run(self) -> None:
        from trigflow.lab.plan import make_plan
        from trigflow.lab.plan.text import describe

        plan = make_plan(
            self.recipe,
            gpus=self.gpus,
            batch_gpu=self.batch_gpu,
            gpu=self.gpu,
            utilization=self.utilization,
            memory_gib=self.memory,
            parallel=self.parallel,
            precision=self.precision,
            checkpointing=self.checkpointing,
        )
        print(json.dumps(plan.as_dict(), indent=2) if self.json else describe(plan))
