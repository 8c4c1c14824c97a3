"""What a study is: a question, the arms that answer it, what is drawn from each, and what the paper expects.

A study names changes to a *base*, a teacher and a student with their settings (`digits`, `mnist`, or any pair of presets), so
that the same study runs on a laptop and on a cluster. Everything here is plain data; nothing in it is executed.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from trigflow.lab.recipes.changes import Changes
from trigflow.lab.recipes.named import Recipe

HIGHER_IS_BETTER = ("precision", "recall")
"""Of these figures more is better, of all others less."""


@dataclass(frozen=True)
class Draw:
    """One way of drawing that every model of an arm is scored with."""

    steps: int
    """Evaluations of a consistency model; solver steps of a diffusion model."""
    guidance: float = 1.0
    """Guidance scale."""
    solver: str = "heun"
    """For a diffusion model."""
    search: bool = False
    """For a consistency model of two or more steps: search its times first, on noise that the score does not use."""

    @property
    def name(self) -> str:
        """Key of the scores: the steps, and the guidance scale where there is one (`2`, `2@1.5`)."""
        return f"{self.steps}" + ("" if self.guidance == 1 else f"@{self.guidance:g}")


@dataclass(frozen=True)
class Base(Recipe):
    """What studies change: a teacher and a student, and what each kind of objective needs on these data.

    The settings of an arm's student are `student`, then `of_kind` for the kind of objective that the arm has, then the
    arm's own changes.
    """

    of_kind: dict[str, Changes] = field(default_factory=dict)
    """Changes by kind of objective, such as `{"vsd": {"optimizer.name": "adam", "optimizer.lr": 2e-4}}`."""
    rates: dict[str, float] = field(default_factory=dict)
    """Factors of the learning rate by kind of objective, chosen for each; see `Arm.rate`."""
    teacher_draws: tuple[Draw, ...] = (Draw(18), Draw(32))
    """What every teacher is scored with, once; the best is its figure (by default at 35 and 63 evaluations, as in the demo)."""


@dataclass(frozen=True)
class Arm:
    """One way of doing it."""

    name: str
    """In the table and the legend."""
    student: Changes | None = field(default_factory=dict)
    """Changes to the student; None draws from the teacher, which is all there is to this arm."""
    teacher: Changes = field(default_factory=dict)
    """Changes to the teacher."""
    start: str | None = None
    """Arm whose finished student this one starts from, instead of from the teacher."""
    length: float = 1.0
    """Iterations of the student as a multiple of the base's (or of what the budget gives)."""
    rate: float | None = None
    """Factor of the student's learning rate (and of that of the fake score, where there is one); None for the base's factor
    for this kind of objective, 1 where it has none."""
    draws: tuple[Draw, ...] | None = None
    """Of this arm; None for those of the study."""
    x: float | None = None
    """Place on the horizontal axis, where the study has one; arms without are horizontal lines then."""
    line: str | None = None
    """Arms of the same line are joined in the figure, and named by it; None for a line of its own."""


@dataclass(frozen=True)
class Expect:
    """One comparison of two arms that a claim implies, by the mean over seeds of paired differences of a figure.

    Figures have names. `DRAW.fd`, `DRAW.precision` and `DRAW.recall` are scores of a draw. `DRAW.ratio` is `DRAW.fd` over that
    of the teacher it was distilled from. `teacher.fd`, `teacher.precision` and `teacher.recall` are the teacher's. Any other
    name is one under `training` of a result, with `NAME.7` for item 7 of a list (`tangent_norm_by_time.7`). Of precision and
    recall more is better, of all others less.
    """

    better: str
    """Arm that should have the better figure."""
    worse: str
    """Arm it is compared with; may be the same one."""
    figure: str = "2.fd"
    """Name of the figure."""
    against: str | None = None
    """Name of the figure of `worse`, where it is another one (two steps against eight evaluations of a solver)."""
    within: float | None = None
    """Expected is no difference, but `better <= within * worse`."""


def better(arm: str, *others: str, by: Iterable[str] = ("1.fd", "2.fd"), within: float | None = None) -> tuple[Expect, ...]:
    """The expectations that an arm is better than each of the others by each of these figures."""
    return tuple(Expect(arm, other, figure, within=within) for other in others for figure in by)


@dataclass(frozen=True)
class Study:
    """A finding to be looked at."""

    name: str
    """On the command line."""
    title: str
    """Of its section and figure."""
    claim: str
    """What the paper says, in one or two sentences, with where it says it."""
    arms: tuple[Arm, ...]
    """What is compared; the first is the default of this package where there is one."""
    draws: tuple[Draw, ...] = (Draw(1), Draw(2, search=True))
    """What is drawn from every student."""
    expectations: tuple[Expect, ...] = ()
    """What the claim implies."""
    budget: Literal["iterations", "seconds"] = "iterations"
    """What is equal between arms: iterations, or seconds of training (iterations are then fitted to a measured step time)."""
    over: Literal["arm", "steps", "guidance"] = "arm"
    """What is along the figure: the arms (bars, or lines over their x), or steps or guidance scale of the draws, with a line
    for each arm."""
    axis: str | None = None
    """Label of the horizontal axis, where there is one; None draws bars."""
    log_axis: bool = False
    """Whether that axis is logarithmic."""
    shown: tuple[str, ...] = ("1.fd", "2.fd")
    """Figures in the table and the picture, named as in `Expect`. Over the guidance scale DRAW is the number of steps, and over
    steps there is none (`fd`)."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds that it is run with unless others are asked for."""
    bases: tuple[str, ...] = ("digits",)
    """Bases on which the study is part of the documented results."""
