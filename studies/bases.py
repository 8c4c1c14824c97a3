"""Bases: what the studies change, sized so that a whole study fits one small machine."""

import dataclasses
from typing import Any

from studies.spec import Base, Draw
from trigflow.lab.recipes import preset
from trigflow.lab.recipes.changes import Changes, change, warmed_within
from trigflow.lab.recipes.starters import RECIPES
from trigflow.networks import UNetConfig
from trigflow.runtime.errors import UserError
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


def _sized(config: RunConfig, iterations: int, checkpoints: int, **changes: Any) -> RunConfig:
    """A run of a recipe with so many iterations and checkpoints, instruments where it has a student, and no pictures."""
    return change(
        config,
        {
            "loop.iterations": iterations,
            "loop.sample_every": 0,
            "loop.checkpoint_every": -(-iterations // checkpoints),
            "loop.keep": 1,
            "loop.instruments": config.objective.kind != "diffusion",
            **warmed_within(config, iterations // 10),
            **changes,
        },
    )


DIGITS, MNIST = RECIPES["digits"], RECIPES["mnist"]
PATCHED: Changes = {"network": UNetConfig(patch=4, width=32, mult=(1, 2), blocks=1)}
BASES: dict[str, Base] = {
    "digits": Base(
        _sized(DIGITS.teacher, 3_000, checkpoints=6), _sized(DIGITS.student, 1_200, checkpoints=6), OF_KIND, RATES["digits"]
    ),
    "mnist": Base(
        _sized(MNIST.teacher, 1_500, checkpoints=20, **PATCHED),
        _sized(MNIST.student, 800, checkpoints=20, **PATCHED),
        OF_KIND,
        RATES["mnist"],
        teacher_draws=(Draw(18),),
    ),
}
"""By name. `digits` is the demo with a third of the student's iterations, and three times those of the teacher: one that is
trained as briefly as the demo's is what limits its students (study `teacher`). `mnist` has a network of larger patches, whose
steps are quicker than those of its recipe."""


def choose_base(
    name: str | None, teacher_preset: str | None, student_preset: str | None, data: str | None = None
) -> tuple[str, Base]:
    """A base and its name: one of `BASES`, by default digits, or that of two presets; on other data, where these are given.

    Raises:
        UserError: for an unknown name, or a preset in the wrong place; the message lists the known ones.
    """
    if teacher_preset is not None and student_preset is not None and name is None:
        name, base = student_preset, Base(preset(teacher_preset, "train"), preset(student_preset, "distill"))
    elif teacher_preset is not None or student_preset is not None:
        raise UserError(
            "a base is named in two ways, or half; expected --base, or --teacher-preset with --student-preset; "
            "correct the command line"
        )
    else:
        name = name or "digits"
        if name not in BASES:
            raise UserError(
                f"unknown base '{name}'; expected one of {', '.join(BASES)}, or --teacher-preset with --student-preset; "
                "correct --base"
            )
        base = BASES[name]
    if data is not None:
        source = {"data.source": data}
        base = dataclasses.replace(base, teacher=change(base.teacher, source), student=change(base.student, source))
    return name, base
