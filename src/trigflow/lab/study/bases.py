"""Bases: what the studies that come with trigflow change, sized so that a whole study fits one small machine."""

import dataclasses
from typing import Any

from trigflow.lab.recipes.shrink import warmed_within
from trigflow.lab.recipes.starters import RECIPES
from trigflow.lab.study.spec import Base, Changes, Draw
from trigflow.networks import UNetConfig
from trigflow.training.config import RunConfig

# A generator moved by a fake score needs small steps, and a fake score that follows it large ones.
_WITH_FAKE_SCORE: Changes = {
    "optimizer.name": "adam",
    "optimizer.lr": 2e-4,
    "objective.fake_lr": 1e-3,
    "objective.adaptive_weight": True,
}

OF_KIND: dict[str, Changes] = {
    # Where the noise is high, the velocity of one data point says little, and its tangent is mostly chance.
    "sct": {"objective.tangent.prior": 1.0},
    "vsd": _WITH_FAKE_SCORE,
    "scd-vsd": _WITH_FAKE_SCORE,
}
"""What each kind of objective needs on both data sets."""


RATES: dict[str, dict[str, float]] = {
    "digits": {"cd": 0.5, "meanflow": 0.5, "meanflow-distill": 0.5},
    "mnist": {"cd": 0.5, "meanflow": 0.5, "meanflow-distill": 0.2},
}
"""Learning rates by base and kind of objective, times that of the preset: those with the best two-step samples in the study
`rates`, or so near to it that seeds differ by more. Kinds that are not named are at the rate of the preset; on mnist sCT and
ECT would be better at a lower one."""


def _sized(
    name: str,
    *,
    teacher: int,
    student: int,
    checkpoints: int,
    network: UNetConfig | None = None,
    **settings: Any,
) -> Base:
    """The recipe of that name with so many iterations, checkpoints of each run, instruments and no pictures.

    Args:
        network: instead of that of the recipe.
    """

    def resize(config: RunConfig, iterations: int) -> RunConfig:
        loop = dataclasses.replace(
            config.loop,
            iterations=iterations,
            sample_every=0,
            checkpoint_every=-(-iterations // checkpoints),
            keep=1,
            instruments=config.objective.kind != "diffusion",
        )
        objective = warmed_within(config.objective, iterations // 10)
        return dataclasses.replace(config, loop=loop, objective=objective, network=network or config.network)

    recipe = RECIPES[name]
    return Base(resize(recipe.teacher, teacher), resize(recipe.student, student), OF_KIND, rates=RATES[name], **settings)


BASES: dict[str, Base] = {
    "digits": _sized("digits", teacher=3_000, student=1_200, checkpoints=6),
    "mnist": _sized(
        "mnist",
        teacher=1_500,
        student=800,
        checkpoints=20,
        network=UNetConfig(patch=4, width=32, mult=(1, 2), blocks=1),
        teacher_draws=(Draw(18),),
    ),
}
"""By name. `digits` is the demo with a third of the student's iterations, and three times those of the teacher: one that is
trained as briefly as the demo's is what limits its students (study `teacher`). `mnist` has a network of larger patches, whose
steps are quicker than those of its recipe."""
