"""Step times: how many steps a student makes while that of the base makes one."""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from studies.study_plan import TeacherAndStudent
from trigflow.data.config import load_data
from trigflow.lab.recipes.changes import change
from trigflow.objectives import Discrete, Distribution
from trigflow.runtime.machine import machine
from trigflow.training.trainer import Trainer

ROUNDS = 12
"""Times that either student is timed, after one round that is not counted."""
ROUND_SECONDS = 0.25
"""About how long it is timed for each time."""
MOST_STEPS = 50
"""Steps of a round at most."""


def measure_pace(base: TeacherAndStudent, arm: TeacherAndStudent, rounds: int = ROUNDS) -> dict[str, Any]:
    """`pace`, the step time of the arm over that of the base, measured in turn in this process, so that what else runs on the
    machine slows both; a median over rounds. Also both step times in `seconds` and `base_seconds`, and the `machine`."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = [_untrained(pair, Path(folder, str(i))) for i, pair in enumerate((base, arm))]
        for trainer in trainers:
            trainer.step()  # makes the optimizer's state, chooses kernels
        counts = [max(1, min(MOST_STEPS, round(ROUND_SECONDS / _seconds(trainer, 2)))) for trainer in trainers]
        times = [[_seconds(t, n) for t, n in zip(trainers, counts, strict=True)] for _ in range(rounds + 1)][1:]
    return {
        "pace": statistics.median(mine / other for other, mine in times),
        "seconds": statistics.median(mine for _, mine in times),
        "base_seconds": statistics.median(other for other, _ in times),
        "machine": machine(),
    }


def timed(pair: TeacherAndStudent) -> TeacherAndStudent:
    """What the step time of a student depends on: its settings and its teacher's, those that make no difference set alike."""
    teacher, student = pair
    alike = {"loop.iterations": 1000, "optimizer.lr": 1e-4}
    of_student: dict[str, Any] = {**alike, "teacher": "teacher"}
    if isinstance(student.objective, Distribution):
        of_student["objective.fake_lr"] = None
    if isinstance(student.objective, Discrete) and student.objective.discrete.initial_steps is None:
        of_student["objective.discrete.steps"] = 64  # how far apart two times are
    return change(teacher, alike), change(student, of_student)


def _untrained(pair: TeacherAndStudent, folder: Path) -> Trainer:
    """The trainer of a student whose teacher has fresh weights: what a step takes does not depend on them."""
    teacher, student = pair
    dataset = load_data(teacher.data)
    student = dataclasses.replace(student, start=None, loop=dataclasses.replace(student.loop, instruments=False))
    model = Trainer(teacher, folder / "teacher", dataset=dataset, progress=False).model()
    return Trainer(student, folder / "student", teacher=model, dataset=dataset, progress=False)


def _seconds(trainer: Trainer, count: int) -> float:
    """Seconds a step, a mean over `count` of them."""
    _synchronize(trainer.device)
    began = time.perf_counter()
    for _ in range(count):
        trainer.step()
    _synchronize(trainer.device)
    return (time.perf_counter() - began) / count


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
