"""Named presets: a teacher and a student configuration each. Plain data, nothing executable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trigflow.errors import UserError
from trigflow.networks import ConditioningConfig, UNetConfig
from trigflow.objectives import TangentConfig
from trigflow.process import Proposal
from trigflow.training.config import (
    DataConfig,
    EMAConfig,
    LoopConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
)


@dataclass(frozen=True)
class Recipe:
    """How to train a teacher, and how to distill it."""

    teacher: RunConfig
    student: RunConfig


def _recipe(
    data: str,
    network: UNetConfig,
    *,
    teacher: tuple[int, float],
    student: tuple[int, float],
    batch_size: int,
    warmup: int,
    every: int,
) -> Recipe:
    """A recipe from what differs between small data sets: (iterations, learning rate) of teacher and student."""
    return Recipe(
        teacher=RunConfig(
            data=DataConfig(source=data),
            network=network,
            objective=ObjectiveConfig(kind="diffusion", proposal=Proposal(-1.0, 1.4)),
            optimizer=OptimizerConfig(lr=teacher[1], schedule="cosine", warmup=100),
            ema=EMAConfig(sigma_rel=0.1),
            loop=LoopConfig(
                iterations=teacher[0], batch_size=batch_size, sample_every=every, checkpoint_every=every, channels_last=True
            ),
        ),
        student=RunConfig(
            data=DataConfig(source=data),
            network=network,
            objective=ObjectiveConfig(kind="scd", proposal=Proposal(-1.0, 1.4), tangent=TangentConfig(warmup=warmup)),
            optimizer=OptimizerConfig(lr=student[1]),
            ema=EMAConfig(sigma_rel=0.1),
            loop=LoopConfig(
                iterations=student[0], batch_size=batch_size, sample_every=every, checkpoint_every=every, channels_last=True
            ),
        ),
    )  # fmt: skip


RECIPES: dict[str, Recipe] = {
    "digits": _recipe(
        "digits",
        UNetConfig(patch=2, width=64, mult=(1, 1), blocks=1, conditioning=ConditioningConfig(width=32)),
        teacher=(1500, 2e-3),
        student=(1500, 1e-4),
        batch_size=64,
        warmup=500,
        every=500,
    ),
    "mnist": _recipe(
        "mnist",
        UNetConfig(patch=2, width=64, mult=(1, 2, 2), blocks=1, attention=(2,)),
        teacher=(10_000, 1e-3),
        student=(10_000, 5e-5),
        batch_size=64,
        warmup=2_000,
        every=1_000,
    ),
    "images": _recipe(
        "images",
        UNetConfig(patch=2, width=96, mult=(1, 2, 2), blocks=2, attention=(2,), dropout=0.1),
        teacher=(50_000, 1e-3),
        student=(50_000, 5e-5),
        batch_size=64,
        warmup=5_000,
        every=2_000,
    ),
}
"""`digits` is the demo's; `mnist` and `images` (any folder or zip) are starting points for one small machine."""


def get_recipe(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        UserError: for an unknown name; the message lists the known ones.
    """
    if name not in RECIPES:
        raise UserError(f"unknown preset '{name}'; expected one of {', '.join(RECIPES)}; correct --preset")
    return RECIPES[name]


def recipe_for(source: str) -> str:
    """Name of the recipe that suits a data source: its own, or `images` for a folder or zip."""
    return source if source in RECIPES and not Path(source).exists() else "images"
