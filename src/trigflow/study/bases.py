"""Bases: what the studies that come with trigflow change, sized so that a whole study fits one small machine."""

from __future__ import annotations

import dataclasses
from typing import Any

from trigflow.recipes.starters import RECIPES
from trigflow.study.spec import Base, Changes, Draw
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


RATES = {"cd": 0.5, "meanflow": 0.5, "meanflow-distill": 0.2}
"""Learning rates by kind of objective, times that of the preset: those with the best two-step samples in the study `rates` on
digits. sCT and ECT are best at that of the preset; sCD has it too, as half and twice of it are as good."""


def _shortened(name: str, *, teacher: float, student: float, checkpoints: int, **settings: Any) -> Base:
    """The recipe of that name with its iterations times these, checkpoints of each run, instruments and no pictures."""

    def shorten(config: RunConfig, share: float) -> RunConfig:
        loop, tangent = config.loop, config.objective.tangent
        iterations = round(loop.iterations * share)
        loop = dataclasses.replace(
            loop,
            iterations=iterations,
            sample_every=0,
            checkpoint_every=-(-iterations // checkpoints),
            keep=1,
            instruments=config.objective.kind != "diffusion",
        )
        tangent = dataclasses.replace(tangent, warmup=min(tangent.warmup, iterations // 10))
        objective = dataclasses.replace(config.objective, tangent=tangent)
        return dataclasses.replace(config, loop=loop, objective=objective)

    recipe = RECIPES[name]
    return Base(shorten(recipe.teacher, teacher), shorten(recipe.student, student), OF_KIND, rates=RATES, **settings)


BASES: dict[str, Base] = {
    "digits": _shortened("digits", teacher=3.0, student=1 / 3, checkpoints=6),
    "mnist": _shortened("mnist", teacher=0.5, student=0.25, checkpoints=20, teacher_draws=(Draw(18),)),
}
"""By name. `digits` is the demo with a third of the student's iterations, and three times those of the teacher: one that is
trained as briefly as the demo's is what limits its students (study `teacher`)."""
