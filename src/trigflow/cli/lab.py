"""Commands of the lab: `demo`, `doctor`, `recipes` and `plan`."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from trigflow.runtime.errors import UserError


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
        print(f"\nOpen {self.out / 'report.html'}; draw more with: trigflow sample {self.out} --num 100 --out digits.png")


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
    """Name of a recipe, see trigflow recipes; or the run folder of a teacher imported from diffusers, for its students."""
    lora: int | None = None
    """Of such a teacher: rank of the adapters that are trained; without it every weight is."""
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
        from trigflow.lab.plan import make_plan, student_of
        from trigflow.lab.plan.run_plan import describe

        folder = Path(self.recipe)
        imported = (folder / "model.json").is_file()
        if self.lora is not None and not imported:
            raise UserError(
                f"--lora for the recipe '{self.recipe}'; expected the run folder of a teacher from diffusers; drop --lora"
            )
        plan = make_plan(
            student_of(folder, self.lora) if imported else self.recipe,
            gpus=self.gpus, batch_gpu=self.batch_gpu, gpu=self.gpu, utilization=self.utilization, memory_gib=self.memory,
            parallel=self.parallel, precision=self.precision, checkpointing=self.checkpointing,
        )  # fmt: skip
        print(json.dumps(plan.as_dict(), indent=2) if self.json else describe(plan))
