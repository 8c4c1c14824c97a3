"""A study that is over in a moment: a narrow network on digits, a few steps, three arms."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import program_server
from studies import pool
from studies.results import CellResult, Results
from studies.runner import Settings, run_study
from studies.spec import Arm, Base, Draw, Expect, Study
from training.tiny import tiny_config

MACHINE = {"processor": "Abacus", "threads": 1, "device": "cpu", "python": "3.0", "torch": "2.0", "trigflow": "0.0"}


def tiny_base(iterations: int = 6, every: int = 0, **choices: Any) -> Base:
    """Teacher and student of a few steps."""
    loop = {"loop.iterations": iterations, "loop.checkpoint_every": every}
    return Base(tiny_config(), tiny_config({"objective.kind": "scd", **loop}), teacher_draws=(Draw(2),), **choices)


STUDY = Study(
    name="tiny",
    title="Normalized, clipped, continued",
    claim="Nothing much.",
    arms=(
        Arm("normalized"),
        Arm("clipped", {"objective.tangent.mode": "clip"}),
        Arm("continued", {"optimizer.lr": 1e-4}, start="normalized"),
        Arm("solver", None, draws=(Draw(2, solver="dpm++2m"),)),
    ),
    draws=(Draw(1), Draw(2, search=True)),
    expectations=(Expect("normalized", "clipped"), Expect("normalized", "solver", "1.fd", against="2.fd")),
    seeds=(0, 1),
)


def made_up(study: Study, figures: dict[str, list[float | str]], **changes: Any) -> Results:
    """Results with these one- and two-step distances by arm, one for each seed; a word instead is a status."""
    cells = []
    for arm, values in figures.items():
        for seed, value in enumerate(values):
            fine = not isinstance(value, str)
            scores = {
                draw.name: {"fd": value, "precision": 0.5, "recall": 0.25, "nfe": draw.steps}
                for a in study.arms
                if a.name == arm
                for draw in a.draws or study.draws
            }
            cells.append(
                CellResult(
                    arm,
                    seed,
                    "done" if fine else str(value),
                    "" if fine else "of a reason",
                    f"students/{arm}{seed}",
                    f"teachers/{seed}",
                    iterations=100,
                    seconds={"train": 9.0},
                    scores=scores if fine else {},
                    machine=0,
                    training={"grad_norm_max": 3.0, "loss_by_time": [1.0, None, 3.0]} if fine else {},
                )
            )
    seeds = tuple(range(max(map(len, figures.values()))))
    teachers = {
        f"teachers/{seed}": CellResult(
            "teacher", seed, "done", scores={"18": {"fd": 2.5, "nfe": 35}, "32": {"fd": 2.0, "nfe": 63, "fd_real": 0.5}}
        )
        for seed in seeds
    }
    settings: dict[str, Any] = {
        "study": study, "base": "digits", "seeds": seeds, "num": 2000, "cells": tuple(cells), "teachers": teachers,
        "recipe": {}, "pace": {}, "command": "python -m studies tiny", "machines": (MACHINE,),
    }  # fmt: skip
    return Results(**{**settings, **changes})


class Forked:
    """A cell in a process that is forked, as far as a pool needs `subprocess.Popen`."""

    def __init__(self, folder: Path) -> None:
        reading, writing = os.pipe()
        self.stdin = os.fdopen(writing, "wb")
        command = ["-m", "studies.cell", str(folder), "--attended"]
        with (folder / "log.txt").open("ab") as output:
            self.pid = program_server.fork(command, [reading, output.fileno(), output.fileno()])
        os.close(reading)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode


def first_forked(folder: Path, threads: int) -> Any:
    """As `pool.spawn`, which every cell but the first gets: starting a process takes longer than the cell."""
    pool.spawn = SPAWN
    return Forked(folder)


SPAWN = pool.spawn
if __name__ == "__main__":  # a runner to be killed
    pool.spawn = first_forked
    settings = Settings(Path(sys.argv[1]), (0,), ("clipped",), num=20, device="cpu")
    run_study(STUDY, tiny_base(100, 10), "base", settings)
