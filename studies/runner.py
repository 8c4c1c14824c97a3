"""Running a study: cells in processes of their own, and what they found in one folder.

OUT/STUDY-BASE/     results.json, table.md, figure.png: all that is known so far, written after every cell
OUT/teachers, OUT/students, OUT/cells, OUT/pace, OUT/locks      shared by all studies; see `studies.study_plan`
"""

import dataclasses
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from tyro.conf import arg

from studies.figure import figure, require_matplotlib
from studies.pace import ROUNDS, measure_pace, timed
from studies.pool import CellPool, RawResult, lock_of, settle, threads_for
from studies.results import CellResult, Results, load_results, save_results
from studies.spec import Arm, Base, Draw, Study
from studies.study_plan import Cell, StudyPlan, TeacherAndStudent, choose_arms, expand, key_of, resolve_arm, settings_of
from studies.study_table import report
from trigflow.lab.recipes import require_data, shrink
from trigflow.lab.recipes.changes import Changes, change
from trigflow.runtime.errors import UserError, first_line
from trigflow.runtime.files import ensure_folder, read_json, write_json, write_text
from trigflow.runtime.machine import resolve_device
from trigflow.training.config import to_dict

SMOKE_ARMS, SMOKE_NUM = 2, 64
LARGE = ("loop.iterations", "loop.batch_size", "network.width", "network.blocks", "network.depth")
"""Settings that arms in miniature do not change."""


@dataclass(frozen=True)
class Settings:
    """How a study is run."""

    out: Path = Path("runs/lab")
    """Folder of all studies."""
    seeds: Annotated[tuple[int, ...], arg(metavar="SEED ...")] = ()
    """One teacher and one student of every arm for each; by default those of the study, 0 1 2 for most."""
    only: Annotated[tuple[str, ...], arg(metavar="ARM ...")] = ()
    """Run only these arms, and those they start from."""
    jobs: int = 1
    """Cells at a time, each in a process of its own with an equal share of the cores."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    num: int = 2000
    """Samples behind every score."""
    retry: bool = False
    """Run failed cells again."""
    smoke: bool = False
    """Only see that it works: one seed and a few steps of the first two arms, in miniature."""
    quiet: bool = False
    """Print no line for each cell."""

    def folder(self, study: Study, base: str) -> Path:
        """Where the results of a study on the base of this name go."""
        return self.out / f"{study.name}-{base}{'-smoke' if self.smoke else ''}"


def run_study(study: Study, base: Base, base_name: str, settings: Settings) -> Results:
    """Run what is missing of a study, and write what is known of it into `OUT/STUDY-BASE`.

    Args:
        study: the study.
        base: teacher and student that it changes.
        base_name: for people.
        settings: how.

    Raises:
        UserError: for names and settings that make no sense, or a folder that cannot be written; without matplotlib.
    """
    require_matplotlib()
    if settings.jobs < 1 or settings.num < 10:
        raise UserError(
            f"{settings.jobs} jobs, {settings.num} samples; expected at least 1 job and 10 samples; correct --jobs or --num"
        )
    return StudyRun(study, base, base_name, settings).run()


class StudyRun:
    """A study that is being run; see `run_study`."""

    def __init__(self, study: Study, base: Base, base_name: str, settings: Settings) -> None:
        self.study, self.base, self.settings = study, base, settings
        self.base_name = base_name
        self.folder = settings.folder(study, base_name)
        self.arms = choose_arms(study, settings.only)
        self.seeds = settings.seeds or study.seeds
        self.num = settings.num
        self.device = str(resolve_device(settings.device))
        if study.budget == "seconds":  # without instruments, which would cost some arms more time than others
            self.base = dataclasses.replace(base, student=change(base.student, {"loop.instruments": False}))
        if settings.smoke:
            self._make_small()
        for config in (base.teacher, base.student):
            require_data(config.data.source)
        self.pace: dict[str, dict[str, Any]] = {}
        self.seen = self.ran = 0

    def _make_small(self) -> None:
        """The first arms, or those that are wanted, without what makes them large."""
        names = self.settings.only or [arm.name for arm in self.arms[:SMOKE_ARMS]]
        self.arms = tuple(map(_small, choose_arms(self.study, names)))
        self.study = dataclasses.replace(self.study, arms=self.arms)
        self.seeds, self.num = self.seeds[:1], SMOKE_NUM
        self.base = dataclasses.replace(
            self.base,
            teacher=shrink(self.base.teacher, iterations=4),
            student=shrink(self.base.student, iterations=4),
            teacher_draws=(Draw(2),),
        )

    def run(self) -> Results:
        """Measure step times where they are needed, run the cells, write the results."""
        ensure_folder(self.folder)
        if self.study.budget == "seconds":
            self._find_pace()
        earlier = self.folder / "results.json"
        seeds = {*self.seeds, *(load_results(earlier).seeds if earlier.is_file() else ())}
        every = self._plan(self.study.arms, tuple(sorted(seeds)))
        wanted = self._plan(self.arms, self.seeds).cells
        if self.settings.retry:
            self._forget_failed(wanted)
        self.began = time.perf_counter()

        def seen(cell: Cell, result: RawResult, before: bool) -> None:
            self._tell(cell, result, before, len(wanted))
            if not before:
                self._write(every)

        try:
            CellPool(self.settings.out, self.settings.jobs, seen).run(wanted)
        finally:
            results = self._write(every)
        figure(results, self.folder / "figure.png")
        return results

    def _plan(self, arms: tuple[Arm, ...], seeds: tuple[int, ...]) -> StudyPlan:
        pace = {arm: found["pace"] for arm, found in self.pace.items()}
        return expand(self.study, self.base, arms, seeds, device=self.device, num=self.num, pace=pace)

    def _forget_failed(self, cells: dict[str, Cell]) -> None:
        for key in cells:
            file = self.settings.out / "cells" / key / "result.json"
            if file.is_file() and read_json(file, "result")["status"] == "failed":
                file.unlink(missing_ok=True)

    def _tell(self, cell: Cell, result: RawResult, before: bool, total: int) -> None:
        """A line for a cell, with an estimate of what is left."""
        self.seen += 1
        self.ran += not before
        scores = ", ".join(f"{name}: {s['fd']:.2f}" for name, s in result.get("scores", {}).items())
        outcome = scores if result["status"] == "done" else result["reason"]
        when = " before" if before else f" in {result['seconds']['process']:.0f} s" if "seconds" in result else ""
        line = f"[{self.seen}/{total}] {cell.name}: {result['status']}{when}; {outcome}"
        if left := total - self.seen:
            line += f"; {left} left"
            line += f", about {left * (time.perf_counter() - self.began) / self.ran / 60:.0f} min" if self.ran else ""
        self._say(line)

    def _say(self, text: str) -> None:
        if not self.settings.quiet:
            print(text, flush=True)

    # Equal seconds -------------------------------------------------------------------------------------------------

    def _find_pace(self) -> None:
        """By arm, its pace against the base; measured once and kept, so that a study that goes on has the same iterations.

        An arm whose steps cannot be taken keeps the base's iterations, and its cells say what is wrong.
        """
        base = self._timed(Arm("base"))
        for arm in self.study.arms:
            side = self._timed(dataclasses.replace(arm, length=1.0))
            if side is None or base is None:
                continue
            found = {"pace": 1.0} if side == base else self._pace(arm, base, side)
            if found is not None:
                self.pace[arm.name] = found

    def _timed(self, arm: Arm) -> TeacherAndStudent | None:
        teacher, student = resolve_arm(self.base, arm, 0, self.device)
        return None if student is None else timed((teacher, student))

    def _pace(self, arm: Arm, base: TeacherAndStudent, side: TeacherAndStudent) -> dict[str, Any] | None:
        """The pace of an arm: from its file, or measured if the arm is wanted."""
        key = key_of({"base": list(map(settings_of, base)), "arm": list(map(settings_of, side))})
        measured = self.settings.out / "pace" / f"{key}.measured.json"
        with lock_of(self.settings.out, f"pace-{key}"):
            if not measured.is_file() and arm in self.arms:
                self._say(f"{self.study.name}: measuring the step time of {arm.name}")
                threads = torch.get_num_threads()
                torch.set_num_threads(threads_for(self.settings.jobs))
                try:
                    write_json(measured, measure_pace(base, side, 1 if self.settings.smoke else ROUNDS))
                except Exception as error:
                    self._say(f"{self.study.name}: no step time of {arm.name}; {first_line(error)}")
                finally:
                    torch.set_num_threads(threads)
                    torch.cuda.empty_cache()  # the memory is the cells'
            return read_json(measured, "step times") if measured.is_file() else None

    # Results -------------------------------------------------------------------------------------------------------

    def _write(self, plan: StudyPlan) -> Results:
        """Gather what is known, and write results.json and table.md."""
        known: dict[str, RawResult] = {}
        settle(self.settings.out, plan.cells, known)
        machines: list[dict[str, Any]] = []

        def result_of(arm: str, seed: int, key: str, teacher: str) -> CellResult:
            found = dict(known.get(key, {"status": "missing"}))
            machine = found.pop("machine", None)
            if machine is not None and machine not in machines:
                machines.append(machine)
            number = None if machine is None else machines.index(machine)
            return CellResult(arm, seed, model=plan.cells[key].model, teacher=teacher, machine=number, **found)

        teachers: dict[str, CellResult] = {}
        cells = []
        for (arm, seed), key in plan.of_arm.items():
            scored = plan.teacher_of[arm, seed]
            teacher = plan.cells[scored].model
            if teacher not in teachers:
                teachers[teacher] = result_of("teacher", seed, scored, teacher)
            cells.append(result_of(arm, seed, key, teacher))
        order = [arm.name for arm in self.study.arms]
        results = Results(
            study=self.study,
            base=self.base_name,
            seeds=tuple(sorted({seed for _, seed in plan.of_arm})),
            num=self.num,
            cells=tuple(sorted(cells, key=lambda cell: (order.index(cell.arm), cell.seed))),
            teachers=teachers,
            recipe={
                "teacher": to_dict(self.base.teacher),
                "student": to_dict(self.base.student),
                "of_kind": self.base.of_kind,
                "rates": self.base.rates,
            },
            pace=self.pace,
            command=shlex.join(["python", *sys.orig_argv[1:]]),
            machines=tuple(machines),
        )
        save_results(results, self.folder / "results.json")
        write_text(self.folder / "table.md", report(results))
        return results


def _small(arm: Arm) -> Arm:
    """An arm in miniature."""

    def smaller(changes: Changes) -> Changes:
        return {name: value for name, value in changes.items() if name not in LARGE}

    student = None if arm.student is None else smaller(arm.student)
    return dataclasses.replace(arm, student=student, teacher=smaller(arm.teacher), length=1.0)
