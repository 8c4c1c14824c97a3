"""Step times: how many steps a student makes while that of the base makes one.

`python -m trigflow.lab.study.pace FILE` measures one pair of students, in a process of its own. FILE holds `base`, `arm` (each
with the settings of a `teacher` and a `student`) and `rounds`; `FILE` with the ending .measured.json is written.
"""

import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from trigflow.data.config import load_data
from trigflow.runtime.files import read_json, write_json
from trigflow.runtime.machine import machine
from trigflow.training.config import RunConfig, from_dict
from trigflow.training.trainer import Trainer

ROUNDS = 12
"""Times that either student is timed, after one round that is not counted."""
ROUND_SECONDS = 0.25
"""About how long it is timed for each time."""
MOST_STEPS = 50
"""Steps of a round at most."""


def main(arguments: list[str]) -> int:
    """Exit code 0 with the file written."""
    file = Path(arguments[0])
    request = read_json(file, "request")
    pair = [(from_dict(request[name]["teacher"]), from_dict(request[name]["student"])) for name in ("base", "arm")]
    write_json(file.with_suffix(".measured.json"), measure_pace(pair[0], pair[1], request["rounds"]))
    return 0


def measure_pace(base: tuple[RunConfig, RunConfig], arm: tuple[RunConfig, RunConfig], rounds: int = ROUNDS) -> dict[str, Any]:
    """`pace`, the step time of the arm over that of the base, measured in turn in this process, so that what else runs on the
    machine slows both; a median over rounds. Also both step times in `seconds` and `base_seconds`, and the `machine`.

    Args:
        base: settings of teacher and student of the base.
        arm: those of the arm.
        rounds: times that either is timed.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainers = [untrained(*pair, Path(folder) / str(i)) for i, pair in enumerate((base, arm))]
        for trainer in trainers:
            trainer.step()  # makes the optimizer's state, chooses kernels
        counts = [max(1, min(MOST_STEPS, round(ROUND_SECONDS / time_steps(trainer, 2)))) for trainer in trainers]
        times = [[time_steps(t, n) for t, n in zip(trainers, counts, strict=True)] for _ in range(rounds + 1)][1:]
    return {
        "pace": statistics.median(mine / other for other, mine in times),
        "seconds": statistics.median(mine for _, mine in times),
        "base_seconds": statistics.median(other for other, _ in times),
        "machine": machine(),
    }


def time_steps(trainer: Trainer, count: int) -> float:
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


def untrained(teacher: RunConfig, student: RunConfig, folder: Path) -> Trainer:
    """The trainer of a student whose teacher has fresh weights: what a step takes does not depend on them."""
    dataset = load_data(teacher.data)
    student = dataclasses.replace(student, start=None, loop=dataclasses.replace(student.loop, instruments=False))
    model = Trainer(teacher, folder / "teacher", dataset=dataset, progress=False).model()
    return Trainer(student, folder / "student", teacher=model, dataset=dataset, progress=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
