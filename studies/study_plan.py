"""From a study to its cells: complete settings, identified by a hash, so that what two studies share is trained once.

::

    OUT/teachers/KEY, OUT/students/KEY     run folders; KEY depends on every setting, on the teacher and on the start
    OUT/cells/KEY                          a model and how it is drawn from: cell.json, result.json, log.txt
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from studies.spec import Arm, Base, Draw, Study
from trigflow.lab.recipes.changes import change
from trigflow.objectives import objective_of
from trigflow.runtime.errors import UserError
from trigflow.training.config import RunConfig, flattened, to_dict
from trigflow.training.runs import with_dropout_of

TeacherAndStudent = tuple[RunConfig, RunConfig]
"""Settings of a teacher and of its student."""


@dataclass(frozen=True)
class Cell:
    """One model and how it is drawn from: what one process trains and scores.

    Attributes:
        name: for people.
        model: its run folder, `teachers/KEY` or `students/KEY`.
        config: complete settings.
        draws: what is scored.
        num: samples of each draw.
        teacher: run folder of the teacher; None for a teacher.
        start: run folder of the student it starts from, instead of from the teacher.
        needs: keys of cells that must be finished before.
    """

    name: str
    model: str
    config: RunConfig
    draws: tuple[Draw, ...]
    num: int
    teacher: str | None = None
    start: str | None = None
    needs: tuple[str, ...] = ()

    @functools.cached_property
    def key(self) -> str:
        """What tells this cell from others."""
        return key_of({name: self.description()[name] for name in ("model", "draws", "num")})

    def description(self) -> dict[str, Any]:
        """The content of cell.json."""
        return {
            "model": self.model,
            "config": to_dict(self.config),
            "teacher": self.teacher,
            "start": self.start,
            "draws": [dataclasses.asdict(draw) for draw in self.draws],
            "num": self.num,
        }


@dataclass
class StudyPlan:
    """The cells of a study.

    Attributes:
        cells: by key, each after those it needs, all arms of one seed before the next seed.
        of_arm: key of the cell of an arm and a seed.
        teacher_of: key of the cell of its teacher.
    """

    cells: dict[str, Cell] = field(default_factory=dict)
    of_arm: dict[tuple[str, int], str] = field(default_factory=dict)
    teacher_of: dict[tuple[str, int], str] = field(default_factory=dict)

    def add(self, cell: Cell) -> str:
        """Add a cell unless it is there already, and return its key; no cell needs itself."""
        needs = tuple(need for need in cell.needs if need != cell.key)
        self.cells.setdefault(cell.key, dataclasses.replace(cell, needs=needs))
        return cell.key


def choose_arms(study: Study, only: Sequence[str]) -> tuple[Arm, ...]:
    """The arms of these names (all of them without any), and those they start from, in the order of the study.

    Raises:
        UserError: for an unknown name; the message lists the known ones.
    """
    known = {arm.name: arm for arm in study.arms}
    names = set(only) or set(known)
    if unknown := [name for name in only if name not in known]:
        raise UserError(f"study '{study.name}' has no arm '{unknown[0]}'; expected one of {', '.join(known)}; correct --only")
    while more := {known[name].start for name in names} - names - {None}:
        names |= {name for name in more if name is not None}
    return tuple(arm for arm in study.arms if arm.name in names)


def resolve_arm(base: Base, arm: Arm, seed: int, device: str) -> tuple[RunConfig, RunConfig | None]:
    """Teacher and student of an arm, with an equal number of iterations; the student is None where the teacher is all.

    The student has the network of its teacher, apart from dropout.

    Raises:
        UserError: for settings that do not exist, make no sense, or change the student's network.
    """
    fixed = {"loop.seed": seed, "loop.device": device}
    teacher = change(base.teacher, {**arm.teacher, **fixed})
    if arm.student is None:
        return teacher, None
    kind = arm.student.get("objective.kind", base.student.objective.kind)
    network = with_dropout_of(base.student.network, teacher.network)
    student = dataclasses.replace(base.student, network=network, process=teacher.process)
    for changes in ({"objective.kind": kind}, base.of_kind.get(kind, {}), arm.student, fixed):
        student = change(student, changes)
    if with_dropout_of(student.network, network) != student.network:
        raise UserError(
            f"arm '{arm.name}' changes the student's network; expected changes to the teacher's, which the student has too; "
            "correct the study"
        )
    rate = base.rates.get(kind, 1.0) if arm.rate is None else arm.rate
    student = change(student, {"optimizer.lr": rate * student.optimizer.lr})
    fake_lr: float | None = getattr(student.objective, "fake_lr", None)
    if fake_lr is not None:
        student = change(student, {"objective.fake_lr": rate * fake_lr})
    return teacher, lengthen(student, arm.length)


LENGTHS = ("loop.iterations", "objective.tangent.warmup", "optimizer.warmup", "optimizer.t_ref")
"""What is counted in iterations and keeps its share of a run: the warmups of tangent and learning rate, and the length after
which the inverse square root sets in."""


def lengthen(config: RunConfig, factor: float) -> RunConfig:
    """The run with `factor` times its iterations, and what is counted in them."""
    settings = flattened(to_dict(config))
    counts = {name: settings[name] for name in LENGTHS if settings.get(name, 0) > 0}
    return change(config, {name: max(1, round(factor * count)) for name, count in counts.items()})


def expand(
    study: Study,
    base: Base,
    arms: Iterable[Arm],
    seeds: Sequence[int],
    *,
    device: str = "cpu",
    num: int = 2000,
    pace: Mapping[str, float] | None = None,
) -> StudyPlan:
    """The cells of these arms and seeds.

    Args:
        study: gives what is drawn.
        base: teacher and student that the arms change.
        arms: those of the study that are wanted, and those they start from; see `choose_arms`.
        seeds: a teacher and a student of every arm for each.
        device: cpu or cuda.
        num: samples that are drawn for a score.
        pace: by arm, its step time over that of the base; students get as many fewer iterations. None for equal iterations.

    Raises:
        UserError: for settings that do not exist or make no sense.
    """
    plan = StudyPlan()
    for seed in seeds:
        left, models = list(arms), dict[str, str]()
        while left:
            arm = next((a for a in left if a.start is None or a.start in models), None)
            if arm is None:
                raise UserError(
                    f"arm '{left[0].name}' starts from '{left[0].start}', which trains no student before it; "
                    "expected the name of another arm; correct the study"
                )
            left.remove(arm)
            teacher, student = resolve_arm(base, arm, seed, device)
            teacher.validate()
            model, here = f"teachers/{key_of(settings_of(teacher))}", (arm.name, seed)
            needed = plan.teacher_of[here] = plan.add(Cell(f"teacher, seed {seed}", model, teacher, base.teacher_draws, num))
            cell = Cell(f"{arm.name}, seed {seed}", model, teacher, arm.draws or study.draws, num, needs=(needed,))
            if student is not None:
                start = None if arm.start is None else models[arm.start]
                student = dataclasses.replace(
                    lengthen(student, 1 / (pace or {}).get(arm.name, 1.0)),
                    teacher=f"../../{model}",
                    start=None if start is None else f"../../{start}",
                )
                student.validate()
                models[arm.name] = f"students/{student.objective.kind}-{key_of(settings_of(student))}"
                needs = cell.needs if arm.start is None else (*cell.needs, plan.of_arm[arm.start, seed])
                cell = dataclasses.replace(
                    cell, model=models[arm.name], config=student, teacher=model, start=start, needs=needs
                )
            plan.of_arm[here] = plan.add(cell)
    return plan


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The settings that are not the default of their objective and network, by dotted name, and which these are: what a run is
    recognized by.

    Defaults are left out so that a version of this package with one more setting finds what an earlier one has finished.
    """
    usual = RunConfig(network=type(config.network)(), objective=objective_of(config.objective.kind))
    plain = {**flattened(to_dict(usual)), "objective.kind": "diffusion", "network.kind": ""}
    missing = object()
    return {name: value for name, value in flattened(to_dict(config)).items() if plain.get(name, missing) != value}


def key_of(description: Any) -> str:
    """12 hexadecimal digits that depend on all of a JSON value."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:12]
