"""Cells in processes: order, failures, locks, and what is left when they are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import programs
from studies import pool
from studies.cell import run_cell
from studies.pool import CellPool, is_held, lock_of, threads_for
from studies.study_plan import StudyPlan, expand
from tiny_study import STUDY, tiny_base
from trigflow.models.model import load
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import read_json, write_json
from trigflow.training.checkpoint import list_checkpoints

TESTS = Path(__file__).parents[1]
DONE = """
import fcntl, json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
out = folder.parent.parent
model = json.loads((folder / "cell.json").read_text())["model"].replace("/", "-")
with open(out / "order", "a") as order, open(out / "locks" / model, "a") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not (folder / "result.json").exists():
        order.write(folder.name + chr(10))
        order.flush()
        time.sleep(0.05)
        (folder / "new").write_text('{"status": "done", "scores": {"1": {"fd": 1.0}}, "seconds": {"process": 1.0}}')
        (folder / "new").rename(folder / "result.json")
"""
"""A cell that is done at once."""
ENDS = {
    "done": DONE,
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "exits": "import sys; print('no memory', file=sys.stderr); sys.exit(3)",
    "killed once": "import os, pathlib, signal, sys\nflag = pathlib.Path(sys.argv[1], 'flag')\n"
    "if not flag.exists():\n    flag.touch()\n    os.kill(os.getpid(), signal.SIGKILL)\n" + DONE,
    "waits": "import os\nos.read(0, 1)",
}


@pytest.fixture
def plan() -> StudyPlan:
    return expand(STUDY, tiny_base(), STUDY.arms, (0,), num=20)


def play(monkeypatch: pytest.MonkeyPatch, plan: StudyPlan, parts: dict[str, str]) -> None:
    """Let arms end as in `ENDS`, the others be done."""
    of = {plan.of_arm[arm, 0]: ENDS[end] for arm, end in parts.items() if arm != "teacher"}
    if "teacher" in parts:
        of[plan.teacher_of["normalized", 0]] = ENDS[parts["teacher"]]

    def spawn(folder: Path, threads: int) -> subprocess.Popen[bytes]:
        code = of.get(folder.name, DONE)
        with (folder / "log.txt").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-S", "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip

    monkeypatch.setattr(pool, "spawn", spawn)


def run(out: Path, plan: StudyPlan, jobs: int = 1) -> dict[str, Any]:
    """Statuses and reasons by arm."""
    (out / "locks").mkdir(exist_ok=True)
    results = CellPool(out, jobs, lambda *_: None).run(plan.cells)
    by_arm = {arm: results[key] for (arm, _), key in plan.of_arm.items()}
    return {arm: (result["status"], result.get("reason", "")) for arm, result in by_arm.items()}


def order(out: Path) -> list[str]:
    return (out / "order").read_text().splitlines()


@pytest.mark.parametrize("jobs", [1, 3])
def test_cells_run_once_and_after_those_they_need(
    plan: StudyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    play(monkeypatch, plan, {})
    assert set(run(tmp_path, plan, jobs).values()) == {("done", "")}
    ran = order(tmp_path)
    assert sorted(ran) == sorted(plan.cells)
    for key, cell in plan.cells.items():
        assert all(ran.index(need) < ran.index(key) for need in cell.needs)
    run(tmp_path, plan, jobs)
    assert order(tmp_path) == ran


def test_one_that_fails_does_not_stop_the_others(plan: StudyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, plan, {"normalized": "killed", "clipped": "exits", "solver": "killed once"})
    assert run(tmp_path, plan) == {
        "normalized": ("failed", "the process was killed by SIGKILL"),
        "clipped": ("failed", "the process ended with code 3: no memory"),
        "continued": ("failed", "normalized, seed 0: the process was killed by SIGKILL"),
        "solver": ("done", ""),
    }
    play(monkeypatch, plan, {})
    assert run(tmp_path, plan)["normalized"][0] == "failed"  # until somebody asks to try again


def test_without_a_teacher_there_are_no_students(plan: StudyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, plan, {"teacher": "exits"})
    reason = "teacher, seed 0: the process ended with code 3: no memory"
    assert set(run(tmp_path, plan).values()) == {("failed", reason)}
    assert not (tmp_path / "order").exists()


def test_a_teacher_that_diverged_counts_against_its_students(
    plan: StudyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, plan, {})
    teacher = plan.cells[plan.teacher_of["normalized", 0]]
    pool.prepare(tmp_path, teacher)
    diverged = {"status": "diverged", "reason": "weights are not finite", "scores": {}}
    write_json(tmp_path / "cells" / teacher.key / "result.json", diverged)
    assert set(run(tmp_path, plan).values()) == {("diverged", "teacher, seed 0: weights are not finite")}


def test_two_runners_do_everything_once(plan: StudyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, plan, {})
    found: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda: found.append(run(tmp_path, plan, 2))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert sorted(order(tmp_path)) == sorted(plan.cells)


def test_a_model_in_use_is_left_alone_until_it_is_free(
    plan: StudyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, plan, {})
    cell = plan.cells[plan.of_arm["clipped", 0]]
    with lock_of(tmp_path, cell.model):
        thread = threading.Thread(target=run, args=(tmp_path, plan, 1))
        thread.start()
        others = len(plan.cells) - 1
        wait_for(lambda: (tmp_path / "order").exists() and len(order(tmp_path)) == others)
        assert cell.key not in order(tmp_path)
    thread.join()
    assert order(tmp_path)[-1] == cell.key


def test_ctrl_c_stops_the_processes(plan: StudyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, plan, {"teacher": "waits"})
    began = CellPool(tmp_path, 1, lambda *_: None)

    def interrupt(_: float) -> None:
        assert len(began.running) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(pool.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        began.run(plan.cells)
    ((_, process),) = began.running.values()
    assert process.returncode == 0


def test_other_defaults_are_not_mixed(plan: StudyPlan, tmp_path: Path) -> None:
    cell = plan.cells[plan.of_arm["clipped", 0]]
    pool.prepare(tmp_path, cell)
    pool.prepare(tmp_path, cell)
    file = tmp_path / "cells" / cell.key / "cell.json"
    raw = read_json(file, "cell")
    raw["config"]["ema"]["sigma_rel"] = 0.05
    write_json(file, raw)
    with pytest.raises(UserError, match="made by a version of trigflow with other defaults"):
        pool.prepare(tmp_path, cell)


def test_processes_find_the_studies_whatever_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(pool.subprocess, "Popen", lambda _, **settings: asked.update(settings))
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    pool.spawn(tmp_path, 1)
    first, *others = asked["env"]["PYTHONPATH"].split(os.pathsep)
    assert Path(first, "studies", "cell.py").is_file()
    assert others == ["elsewhere"]


def test_threads_are_a_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [threads_for(jobs) for jobs in (1, 3, 16)] == [8, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert [threads_for(jobs) for jobs in (1, 3)] == [4, 2]


# Real processes, really killed ----------------------------------------------------------------------------------------


def wait_for(condition: Any, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def child_of(pid: int) -> int | None:
    """The youngest process whose parent is `pid`."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    return int(found[-1]) if found else None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks ps for children")
def test_killed_children_and_parents_lose_nothing_but_steps(tmp_path: Path) -> None:
    """A child is killed, then its parent, each at a new checkpoint. The orphan ends by itself, having saved; the study that
    is started again goes on from there, and ends with the weights of one that never stopped."""
    plan: StudyPlan = expand(STUDY, tiny_base(100, 10), [STUDY.arms[1]], (0,), num=20)
    teacher, cell = plan.cells.values()
    whole = tmp_path / "whole"
    for one in (teacher, cell):
        assert run_cell(one.description(), whole)["status"] == "done"
    out = tmp_path / "killed"
    (out / "teachers").mkdir(parents=True)
    (whole / teacher.model).rename(out / teacher.model)

    command = ["-m", "tiny_study", out]
    places = os.pathsep.join(filter(None, [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    imports = ["matplotlib.pyplot", "trigflow.lab.demo"]
    runner = programs.start(command, environment=environment, session=True, imports=imports)
    student = out / cell.model

    def newest() -> int:
        found = list_checkpoints(student)
        return int(found[-1].name) if found else 0

    wait_for(lambda: newest() > 0)
    child = child_of(runner.pid)
    assert child is not None
    os.kill(child, signal.SIGKILL)
    at = newest()
    wait_for(lambda: newest() > at)
    child = child_of(runner.pid)
    assert child is not None
    os.killpg(runner.pid, signal.SIGKILL)
    assert runner.wait() == -signal.SIGKILL
    wait_for(lambda: not is_held(lock_of(out, cell.model)))
    at = newest()
    assert 0 < at < 100
    assert not (out / "cells" / cell.key / "result.json").exists()

    assert programs.start(command, environment=environment).wait(timeout=300) == 0
    assert read_json(out / "cells" / cell.key / "result.json", "result")["status"] == "done"
    assert (out / "tiny-base" / "figure.png").is_file()
    ours, theirs = (load(folder / cell.model, "cpu").network.state_dict() for folder in (out, whole))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
