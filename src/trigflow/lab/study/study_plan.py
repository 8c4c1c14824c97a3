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

from trigflow.lab.study.spec import Arm, Base, Changes, Draw, Study
from trigflow.objectives import as_kind, objective_of
from trigflow.runtime.errors import UserError
from trigflow.training.config import RunConfig, flattened, to_dict
from trigflow.training.runs import with_dropout_of


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
        return key_of({"model": self.model, "draws": [dataclasses.asdict(draw) for draw in self.draws], "num": self.num})

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
    for name in only:
        if name not in known:
            raise UserError(f"study '{study.name}' has no arm '{name}'; expected one of {', '.join(known)}; correct --only")
    names = set(only) or set(known)
    while more := {known[name].start for name in names} - names - {None}:
        names |= {name for name in more if name is not None}
    return tuple(arm for arm in study.arms if arm.name in names)


def change(config: Any, changes: Changes) -> Any:
    """A copy with settings changed by dotted name: `change(config, {"loop.seed": 1})`.

    Raises:
        UserError: for a setting that does not exist; the message lists its neighbours.
    """
    for name, value in changes.items():
        if name == "objective.kind":
            config = dataclasses.replace(config, objective=as_kind(config.objective, value))
            continue
        head, _, rest = name.partition(".")
        known = [f.name for f in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else []
        if head not in known:
            raise UserError(f"unknown setting '{name}'; expected one of {', '.join(known)}; correct the study")
        inner = change(getattr(config, head), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{head: inner})
    return config


def resolve_arm(base: Base, arm: Arm, seed: int, device: str) -> tuple[RunConfig, RunConfig | None]:
    """Teacher and student of an arm, with an equal number of iterations; the student is None where the teacher is all.

    The student has the network of its teacher, apart from dropout.

    Raises:
        UserError: for settings that do not exist, make no sense, or change the student's network.
    """
    fixed = {"loop.seed": seed, "loop.device": device}
    teacher: RunConfig = change(change(base.teacher, arm.teacher), fixed)
    if arm.student is None:
        return teacher, None
    kind = arm.student.get("objective.kind", base.student.objective.kind)
    network = with_dropout_of(base.student.network, teacher.network)
    student = dataclasses.replace(base.student, network=network, process=teacher.process)
    student = change(change(change(student, {"objective.kind": kind, **base.of_kind.get(kind, {})}), arm.student), fixed)
    if with_dropout_of(student.network, network) != student.network:
        raise UserError(
            f"arm '{arm.name}' changes the student's network; expected changes to the teacher's, which the student has too; "
            "correct the study"
        )
    rate = base.rates.get(kind, 1.0) if arm.rate is None else arm.rate
    fake_lr = getattr(student.objective, "fake_lr", None)
    faster = {} if fake_lr is None else {"objective.fake_lr": rate * fake_lr}
    student = change(student, {"optimizer.lr": rate * student.optimizer.lr, **faster})
    return teacher, lengthen(student, arm.length)


def lengthen(config: RunConfig, factor: float) -> RunConfig:
    """The run with `factor` times its iterations. What is counted in iterations keeps its share of the run: the warmups of
    tangent and learning rate, and the length after which the inverse square root sets in."""
    if factor == 1:
        return config

    def scaled(count: int) -> int:
        return max(1, round(factor * count)) if count > 0 else count

    tangent = getattr(config.objective, "tangent", None)
    warmup = {} if tangent is None else {"objective.tangent.warmup": scaled(tangent.warmup)}
    return change(
        config,
        {
            "loop.iterations": scaled(config.loop.iterations),
            **warmup,
            "optimizer.warmup": scaled(config.optimizer.warmup),
            "optimizer.t_ref": scaled(config.optimizer.t_ref),
        },
    )


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
            model, name = f"teachers/{key_of(settings_of(teacher))}", f"{arm.name}, seed {seed}"
            draws, here = arm.draws or study.draws, (arm.name, seed)
            scored = plan.add(Cell(f"teacher, seed {seed}", model, teacher, base.teacher_draws, num))
            plan.teacher_of[here] = scored
            if student is None:
                plan.of_arm[here] = plan.add(Cell(name, model, teacher, draws, num, needs=(scored,)))
                continue
            start = None if arm.start is None else models[arm.start]
            needs = (scored,) if arm.start is None else (scored, plan.of_arm[arm.start, seed])
            student = dataclasses.replace(
                lengthen(student, 1 / (pace or {}).get(arm.name, 1.0)),
                teacher=f"../../{model}", start=None if start is None else f"../../{start}",
            )  # fmt: skip
            student.validate()
            models[arm.name] = f"students/{student.objective.kind}-{key_of(settings_of(student))}"
            plan.of_arm[here] = plan.add(Cell(name, models[arm.name], student, draws, num, model, start, needs))
    return plan


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The settings that are not the default of their objective and network, by dotted name, and which these are: what a run is
    recognized by.

    Defaults are left out so that a version of this package with one more setting finds what an earlier one has finished.
    """
    usual = RunConfig(network=type(config.network)(), objective=objective_of(config.objective.kind))
    mine, plain = (
        flattened(to_dict(config)),
        flattened(to_dict(usual)) | {"objective.kind": "diffusion", "network.kind": ""},
    )
    return {name: value for name, value in mine.items() if name not in plain or plain[name] != value}


def key_of(description: dict[str, Any]) -> str:
    """12 hexadecimal digits that depend on all of a JSON value."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:12]
