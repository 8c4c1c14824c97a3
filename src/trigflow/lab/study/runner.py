"""Running a study: cells in processes of their own, and what they found in one folder.

OUT/STUDY-BASE/     results.json, table.md, figure.png: all that is known so far, written after every cell
OUT/teachers, OUT/students, OUT/cells, OUT/pace, OUT/locks      shared by all studies; see `trigflow.lab.study.study_plan`
"""

import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trigflow.lab.recipes import preset, require_data, shrink
from trigflow.lab.study.figure import figure, require_matplotlib
from trigflow.lab.study.pace import ROUNDS
from trigflow.lab.study.pool import CellPool, RawResult, locked, read_result, spawn, stop, stopped_by, threads_for
from trigflow.lab.study.results import CellResult, Results, load_results, save_results
from trigflow.lab.study.spec import Arm, Base, Changes, Draw, Settings, Study
from trigflow.lab.study.study_plan import Cell, StudyPlan, change, choose_arms, expand, key_of, resolve_arm, settings_of
from trigflow.lab.study.study_table import report
from trigflow.objectives import Discrete, Distribution
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import ensure_folder, read_json, write_json, write_text
from trigflow.training.config import RunConfig, to_dict

SMOKE_ARMS, SMOKE_NUM = 2, 64
TeacherAndStudent = tuple[RunConfig, RunConfig]
"""Settings of a teacher and of its student."""


def run_study(study: Study, base: Base, base_name: str, settings: Settings, command: str | None = None) -> Results:
    """Run what is missing of a study, and write what is known of it into `OUT/STUDY-BASE`.

    Args:
        study: the study.
        base: teacher and student that it changes.
        base_name: for people.
        settings: how.
        command: what is recorded as having made the results; that of this process by default.

    Raises:
        UserError: for names and settings that make no sense, or a folder that cannot be written.
        MissingExtraError: without matplotlib.
    """
    require_matplotlib()
    if settings.jobs < 1 or settings.num < 10:
        raise UserError(
            f"{settings.jobs} jobs, {settings.num} samples; expected at least 1 job and 10 samples; correct --jobs or --num"
        )
    return StudyRun(study, base, base_name, settings, command or shlex.join(["trigflow", *sys.argv[1:]])).run()


class StudyRun:
    """A study that is being run; see `run_study`."""

    def __init__(self, study: Study, base: Base, base_name: str, settings: Settings, command: str) -> None:
        from trigflow.runtime.machine import resolve_device

        self.study = study
        self.arms = choose_arms(study, settings.only)
        self.settings = settings
        self.base_name, self.command = base_name, command
        self.out = settings.out
        self.folder = settings.folder(study, base_name)
        self.device = str(resolve_device(settings.device))
        self.seeds = settings.seeds or study.seeds
        self.num = settings.num
        self.base = _for_seconds(base) if study.budget == "seconds" else base
        if settings.smoke:
            self._make_small()
        for config in (base.teacher, base.student):
            require_data(config.data.source)

    def _make_small(self) -> None:
        self.base = dataclasses.replace(
            self.base,
            teacher=shrink(self.base.teacher, iterations=4),
            student=shrink(self.base.student, iterations=4),
            teacher_draws=(Draw(2),),
        )
        chosen = self.arms if self.settings.only else self.arms[:SMOKE_ARMS]
        names = choose_arms(self.study, [arm.name for arm in chosen])
        self.arms = tuple(map(_small_arm, names))
        self.seeds, self.num = self.seeds[:1], SMOKE_NUM

    def run(self) -> Results:
        """Measure step times where they are needed, run the cells, write the results."""
        ensure_folder(self.folder)
        pace = self._measured_pace() if self.study.budget == "seconds" else {}
        arms = [arm for arm in self.study.arms if not self.settings.smoke] or list(self.arms)
        every = self._plan(arms, self._all_seeds(), pace)
        wanted = self._plan(self.arms, self.seeds, pace)
        if self.settings.retry:
            self._forget_failed(wanted)
        progress = Progress(len(wanted.cells), self.settings.quiet)

        def seen(cell: Cell, result: RawResult, before: bool) -> None:
            progress.cell(cell, result, before)
            if not before:
                self._write(every, pace)

        try:
            CellPool(self.out, self.settings.jobs, seen).run(wanted.cells)
        finally:
            results = self._write(every, pace)
        figure(results, self.folder / "figure.png")
        return results

    def _plan(self, arms: Sequence[Arm], seeds: Sequence[int], pace: dict[str, dict[str, Any]]) -> StudyPlan:
        factors = {name: found["pace"] for name, found in pace.items()}
        return expand(
            self.study, self.base, arms, seeds,
            device=self.device, num=self.num, pace=factors,
        )  # fmt: skip

    def _all_seeds(self) -> tuple[int, ...]:
        """The seeds asked for, and those of earlier results in this folder."""
        file = self.folder / "results.json"
        return tuple(sorted({*self.seeds, *(load_results(file).seeds if file.is_file() else ())}))

    def _forget_failed(self, plan: StudyPlan) -> None:
        for key in plan.cells:
            result = read_result(self.out, key)
            if result is not None and result["status"] == "failed":
                (self.out / "cells" / key / "result.json").unlink(missing_ok=True)

    # Equal seconds -------------------------------------------------------------------------------------------------

    def _measured_pace(self) -> dict[str, dict[str, Any]]:
        """By arm, its pace against the base; measured once and kept, so that a study that goes on has the same iterations.

        An arm whose steps cannot be taken keeps the base's iterations, and its cells say what is wrong.
        """
        found = {}
        base = _timed(*resolve_arm(self.base, Arm("base"), 0, self.device))
        for arm in self.arms if self.settings.smoke else self.study.arms:
            side = _timed(*resolve_arm(self.base, dataclasses.replace(arm, length=1.0), 0, self.device))
            if side == base:
                found[arm.name] = {"pace": 1.0}
            elif side is not None and base is not None:
                measured = self._pace(arm, base, side)
                if measured is not None:
                    found[arm.name] = measured
        return found

    def _pace(self, arm: Arm, base: TeacherAndStudent, side: TeacherAndStudent) -> dict[str, Any] | None:
        """The pace of an arm: from its file, or measured if the arm is wanted."""
        key = key_of({"base": list(map(settings_of, base)), "arm": list(map(settings_of, side))})
        folder = ensure_folder(self.out / "pace")
        measured = folder / f"{key}.measured.json"
        with locked(self.out / "locks" / f"pace-{key}"):
            if not measured.is_file() and arm in self.arms:
                self._say(f"{self.study.name}: measuring the step time of {arm.name}")
                rounds = 1 if self.settings.smoke else ROUNDS
                sides = {
                    name: {"teacher": to_dict(teacher), "student": to_dict(student)}
                    for name, (teacher, student) in (("base", base), ("arm", side))
                }
                write_json(folder / f"{key}.json", {**sides, "rounds": rounds})
                threads = threads_for(self.settings.jobs)
                process = spawn("trigflow.lab.study.pace", [str(folder / f"{key}.json")], threads, folder / f"{key}.log")
                try:
                    process.wait()
                finally:
                    process.kill()
                    stop([process])
            return read_json(measured, "step times") if measured.is_file() else None

    # Results -------------------------------------------------------------------------------------------------------

    def _write(self, plan: StudyPlan, pace: dict[str, dict[str, Any]]) -> Results:
        """Gather what is known, and write results.json and table.md."""
        results = self._gather(plan, pace)
        save_results(results, self.folder / "results.json")
        write_text(self.folder / "table.md", report(results))
        return results

    def _gather(self, plan: StudyPlan, pace: dict[str, dict[str, Any]]) -> Results:
        machines: list[dict[str, Any]] = []
        teachers = {}
        cells = []
        for (arm, seed), key in plan.of_arm.items():
            teacher = plan.cells[plan.teacher_of[arm, seed]]
            if teacher.model not in teachers:
                teachers[teacher.model] = self._cell_result("teacher", seed, teacher, teacher, plan, machines)
            cells.append(self._cell_result(arm, seed, plan.cells[key], teacher, plan, machines))
        order = {arm.name: i for i, arm in enumerate(self.study.arms)}
        cells.sort(key=lambda cell: (order[cell.arm], cell.seed))
        study = dataclasses.replace(self.study, arms=self.arms) if self.settings.smoke else self.study
        return Results(
            study=study,
            base=self.base_name,
            seeds=tuple(sorted({seed for _, seed in plan.of_arm})),
            num=self.num,
            cells=tuple(cells),
            teachers=teachers,
            recipe={
                "teacher": to_dict(self.base.teacher),
                "student": to_dict(self.base.student),
                "of_kind": self.base.of_kind,
                "rates": self.base.rates,
            },
            pace=pace,
            command=self.command,
            machines=tuple(machines),
        )

    def _cell_result(
        self, arm: str, seed: int, cell: Cell, teacher: Cell, plan: StudyPlan, machines: list[dict[str, Any]]
    ) -> CellResult:
        found = self._known(cell, plan)
        machine = found.pop("machine", None)
        if machine is not None and machine not in machines:
            machines.append(machine)
        return CellResult(
            arm, seed, model=cell.model, teacher=teacher.model,
            machine=None if machine is None else machines.index(machine), **found,
        )  # fmt: skip

    def _known(self, cell: Cell, plan: StudyPlan) -> RawResult:
        """The result of a cell, or why it has none."""
        found = read_result(self.out, cell.key)
        stopped = None if found else stopped_by(cell, plan.cells, lambda key: self._known(plan.cells[key], plan))
        return found or stopped or {"status": "missing"}

    def _say(self, text: str) -> None:
        if not self.settings.quiet:
            print(text, flush=True)


def _for_seconds(base: Base) -> Base:
    """Without instruments, which would cost some arms more time than others."""
    loop = dataclasses.replace(base.student.loop, instruments=False)
    return dataclasses.replace(base, student=dataclasses.replace(base.student, loop=loop))


def _timed(teacher: RunConfig, student: RunConfig | None) -> TeacherAndStudent | None:
    """What the step time of a student depends on: its settings and its teacher's, those left out that make no difference."""
    if student is None:
        return None
    same: Changes = {"loop.iterations": 1000, "optimizer.lr": 1e-4, "teacher": "teacher"}
    if isinstance(student.objective, Distribution):
        same["objective.fake_lr"] = None
    if isinstance(student.objective, Discrete) and student.objective.discrete.initial_steps is None:
        same["objective.discrete.steps"] = 64  # how far apart two times are
    return change(teacher, {"loop.iterations": 1000, "optimizer.lr": 1e-4}), change(student, same)


def _small_arm(arm: Arm) -> Arm:
    """An arm in miniature: its changes without lengths, widths and batch sizes."""
    large = ("loop.iterations", "loop.batch_size", "network.width", "network.blocks", "network.depth")

    def smaller(changes: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in changes.items() if name not in large}

    student = None if arm.student is None else smaller(arm.student)
    return dataclasses.replace(arm, student=student, teacher=smaller(arm.teacher), length=1.0)


@dataclass
class Progress:
    """One line for each cell, with an estimate of what is left.

    Attributes:
        total: cells.
        quiet: print nothing.
    """

    total: int
    quiet: bool

    def __post_init__(self) -> None:
        self.began = time.perf_counter()
        self.seen = self.run = 0

    def cell(self, cell: Cell, result: RawResult, before: bool) -> None:
        """Take note of a cell."""
        self.seen += 1
        self.run += not before
        if self.quiet:
            return
        scores = ", ".join(f"{name}: {s['fd']:.2f}" for name, s in result.get("scores", {}).items())
        spent = f" in {result['seconds']['process']:.0f} s" if "seconds" in result and not before else ""
        outcome = {"done": scores}.get(result["status"], result["reason"])
        left = self.total - self.seen
        line = f"[{self.seen}/{self.total}] {cell.name}: {result['status']}{' before' if before else ''}{spent}"
        estimate = f"; {left} left"
        if self.run and left:
            estimate += f", about {left * (time.perf_counter() - self.began) / self.run / 60:.0f} min"
        print(f"{line}; {outcome}{estimate if left else ''}", flush=True)


def base_of(teacher: str, student: str) -> Base:
    """The base of two presets, see `trigflow recipes`.

    Raises:
        UserError: for an unknown preset, or one in the wrong place.
    """
    return Base(preset(teacher, "train"), preset(student, "distill"))


def with_data(base: Base, source: str | None) -> Base:
    """The base on these data instead of its own, where they are given."""
    if source is None:
        return base
    data = {"data.source": source}
    return dataclasses.replace(base, teacher=change(base.teacher, data), student=change(base.student, data))
