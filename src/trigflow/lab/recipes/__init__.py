"""Named presets, plain data: teacher and student for the small data sets, and every run of the paper.

`get_recipe` gives a teacher and a student together, `get_run` a single run, `preset` what a command makes of either name.
"""

from pathlib import Path
from typing import Literal

from trigflow.data.sources.opening import EMBEDDED, REGISTERED
from trigflow.lab.recipes.changes import shrink
from trigflow.lab.recipes.named import NamedRun, Recipe
from trigflow.lab.recipes.paper import PAPER
from trigflow.lab.recipes.starters import ADAPTERS, RECIPES
from trigflow.lab.recipes.transformers import TRANSFORMERS
from trigflow.runtime.errors import UserError
from trigflow.training.config import RunConfig

STARTER_DATA: dict[str, tuple[tuple[int, int, int], int]] = {
    "digits": ((1, 8, 8), 10),
    "mnist": ((1, 28, 28), 10),
    "emoji": ((3, 48, 48), 0),
    "images": ((3, 32, 32), 0),
}
"""Shape and classes of the data of the starters; those of `images` are an example."""

RECIPES["adapters"] = Recipe(RECIPES["images"].teacher, ADAPTERS)

RUNS: dict[str, NamedRun] = {
    run.name: run
    for run in (
        *(
            NamedRun(f"{name}-{role}", config, *STARTER_DATA[name])
            for name, recipe in RECIPES.items()
            if name in STARTER_DATA
            for role, config in (("teacher", recipe.teacher), ("scd", recipe.student))
        ),
        *PAPER,
        *TRANSFORMERS,
    )
}
"""Every single run by its name."""

DATA = {
    "images": "a folder or .zip of images",
    "cifar10": "a folder or .zip of the 50,000 training images of CIFAR-10",
    "imagenet64": "a folder or .zip of ImageNet at 64x64, one sub-folder a class",
    "imagenet512-latents": "a .zip of latents of ImageNet at 512x512, written by trigflow encode",
    "imagenet256-latents": "a .zip of latents of ImageNet at 256x256, written by trigflow encode",
}
"""What stands in `data.source` of a preset whose data only the user has, and what belongs there."""


def register(name: str, recipe: Recipe) -> None:
    """Add a preset from outside the package: teacher and student that `--preset NAME` stands for, and that data of this name
    are trained with. Raises a UserError for a name that is taken by one of the package's own."""
    if name in (*STARTER_DATA, "adapters") or name in RUNS:
        raise UserError(f"the name '{name}' is taken by a preset that comes along; expected a new one; choose another")
    RECIPES[name] = recipe


def get_recipe(name: str) -> Recipe:
    """A teacher and a student by name, such as digits. Raises a UserError for an unknown one; the message lists the known."""
    if name not in RECIPES:
        raise UserError(f"unknown preset '{name}'; expected one of {', '.join(RECIPES)}; correct --preset")
    return RECIPES[name]


def get_run(name: str) -> NamedRun:
    """A single run by name, such as `img512-xl-scd`; `RUNS` has all of them. Raises a UserError for an unknown name; where it
    is the beginning of known ones, the message lists these."""
    if name in RUNS:
        return RUNS[name]
    expected = ", ".join(_begun_with(name)) or "a name that trigflow recipes lists"
    raise UserError(f"unknown recipe '{name}'; expected {expected}; correct the name")


def _begun_with(name: str) -> list[str]:
    """The few runs of this data set and size, if that is what was named."""
    near = [known for known in RUNS if name and known.startswith(f"{name}-")]
    return near if len(near) <= 4 else []


def preset(name: str, command: Literal["train", "distill"]) -> RunConfig:
    """The settings that `--preset NAME` means to a command: a part of a recipe, or a single run that it can start. Raises a
    UserError for an unknown name, or a run that the other command starts; the message names that command."""
    if name in RECIPES:
        return RECIPES[name].teacher if command == "train" else RECIPES[name].student
    if name not in RUNS:
        expected = ", ".join([*RECIPES, *_begun_with(name), "or a name that trigflow recipes lists"])
        raise UserError(f"unknown preset '{name}'; expected one of {expected}; correct --preset")
    run = RUNS[name]
    if run.command == command or run.config.objective.kind == "sct":  # from scratch, or from a teacher's weights
        return run.config
    if command == "train":
        raise UserError(
            f"preset '{name}' distills a teacher, which train has none of; expected a teacher or sct preset; "
            f"use: trigflow distill TEACHER --preset {name}"
        )
    raise UserError(
        f"preset '{name}' trains a teacher, which distill starts from; expected an sct, scd or scd-vsd preset; "
        f"use: trigflow train --preset {name}"
    )


def require_data(source: str) -> None:
    """Require that the user has said where the data are, where the preset cannot know. Raises a UserError for the placeholder
    of a preset, unless something of that name exists; the message says what to pass."""
    if source in DATA and not Path(source).exists():
        raise UserError(f"no data: the preset only says '{source}'; expected {DATA[source]}; pass --data PATH")


def recipe_for(source: str) -> str:
    """Name of the recipe that suits a data source: its own, or `images` for a folder or zip. Data that have a name are meant by
    it even beside a folder of that name."""
    named = source in (*EMBEDDED, *REGISTERED) or not Path(source).exists()
    return source if source in RECIPES and named else "images"


__all__ = [
    "DATA", "RECIPES", "RUNS", "NamedRun", "Recipe", "get_recipe", "get_run", "preset", "recipe_for", "register",
    "require_data", "shrink",
]  # fmt: skip
