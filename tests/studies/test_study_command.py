"""`python -m studies`, with cells that are done by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import studies.__main__ as entry
from conftest import Result, typed
from studies import bases, pace, pool, runner
from studies.bases import choose_base
from studies.pool import CellPool
from studies.results import load_results
from studies.spec import Arm
from studies.study_plan import Cell, TeacherAndStudent
from tiny_study import MACHINE, STUDY, tiny_base
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import write_json

Command = Callable[..., Result]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("tiny", ...)` runs `python -m studies tiny ...` in this process."""
    return typed(entry.main, capsys)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """One study, on one base."""
    monkeypatch.setattr(entry, "STUDIES", {"tiny": STUDY})
    monkeypatch.setattr(bases, "BASES", {"digits": tiny_base(100), "other": tiny_base(50)})


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """Cells that were started, which are done at once; failed where the name of the arm is in `failing`."""
    cells: list[Cell] = []

    def start(self: CellPool, cell: Cell) -> None:
        cells.append(cell)
        scores = {draw.name: {"fd": 1.0 + draw.steps + cell.config.loop.seed, "nfe": draw.steps} for draw in cell.draws}
        scores = {name: {**s, "fd_real": 0.5, "precision": 0.5, "recall": 0.5} for name, s in scores.items()}
        result: dict[str, Any] = {
            "status": "done", "reason": "", "scores": scores, "seconds": {"train": 2.0, "process": 3.0, "evaluate": 1.0},
            "iterations": cell.config.loop.iterations, "skipped": 0, "parameters": 10, "training": {}, "machine": MACHINE,
        }  # fmt: skip
        if cell.name in FAILING:
            result = {"status": "failed", "reason": "no luck", "machine": MACHINE}
        write_json(self.out / "cells" / cell.key / "result.json", result)

    monkeypatch.setattr(CellPool, "_start", start)
    FAILING.clear()
    return cells


FAILING: set[str] = set()


def test_a_study_writes_results_table_and_figure(
    command: Command, started: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.orig_argv", ["/usr/bin/python3", "-m", "studies", "tiny", "--out", "my lab"])
    result = command("tiny", "--out", tmp_path)
    assert (result.code, result.err) == (0, "")
    folder = tmp_path / "tiny-digits"
    assert sorted(path.name for path in folder.iterdir()) == ["figure.png", "results.json", "table.md"]
    assert len(started) == 10
    assert result.out.splitlines()[0] == "[1/10] teacher, seed 0: done in 3 s; 2: 3.00; 9 left, about 0 min"
    assert "normalized against clipped, 2.fd: not settled by 2 seeds; better by 0 ± 0" in result.out
    results = load_results(folder / "results.json")
    assert results.seeds == (0, 1)
    assert results.study == STUDY
    assert results.command == "python -m studies tiny --out 'my lab'"
    assert {cell.status for cell in results.cells} == {"done"}
    assert results.machines == (MACHINE,)
    assert results.recipe["student"]["loop"]["iterations"] == 100


def test_what_is_finished_is_not_repeated_and_more_can_be_added(command: Command, started: list[Cell], tmp_path: Path) -> None:
    command("tiny", "--out", tmp_path, "--seeds", 0, "--only", "clipped")
    assert [cell.name for cell in started] == ["teacher, seed 0", "clipped, seed 0"]
    results = load_results(tmp_path / "tiny-digits" / "results.json")
    assert [cell.status for cell in results.of("normalized").values()] == ["missing"]
    started.clear()
    result = command("tiny", "--out", tmp_path, "--seeds", 0, 5, "--quiet")
    assert len(started) == 3 + 5
    assert "[" not in result.out
    assert load_results(tmp_path / "tiny-digits" / "results.json").seeds == (0, 5)
    started.clear()
    command("tiny", "--out", tmp_path, "--seeds", 7, "--only", "solver")
    results = load_results(tmp_path / "tiny-digits" / "results.json")
    assert results.seeds == (0, 5, 7)
    assert results.of("clipped")[5].status == "done"


def test_another_base_has_cells_and_results_of_its_own(command: Command, started: list[Cell], tmp_path: Path) -> None:
    command("tiny", "--out", tmp_path, "--only", "clipped")
    command("tiny", "--out", tmp_path, "--only", "clipped", "--base", "other")
    assert len(started) == 2 * 2 + 2  # the teachers are the same
    assert (tmp_path / "tiny-other" / "results.json").is_file()


def test_a_base_on_other_data_has_results_under_another_name(
    command: Command, started: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "require_data", lambda source: None)
    command("tiny", "--out", tmp_path, "--only", "clipped")
    before = (tmp_path / "tiny-digits" / "results.json").read_bytes()
    command("tiny", "--out", tmp_path, "--only", "clipped", "--data", "photos/birds.zip", "--seeds", 3)
    assert (tmp_path / "tiny-digits" / "results.json").read_bytes() == before
    found = load_results(tmp_path / "tiny-digits-birds" / "results.json")
    assert (found.base, found.seeds, found.recipe["student"]["data"]["source"]) == ("digits-birds", (3,), "photos/birds.zip")


def test_failed_cells_are_left_until_asked_for(command: Command, started: list[Cell], tmp_path: Path) -> None:
    FAILING.add("normalized, seed 1")
    result = command("tiny", "--out", tmp_path)
    assert result.code == 1
    assert result.err == "2 cells failed; their reasons are in table.md, run them again with --retry\n"
    table = (tmp_path / "tiny-digits" / "table.md").read_text()
    assert "* normalized, seed 1, failed: no luck" in table
    assert "* continued, seed 1, failed: normalized, seed 1: no luck" in table
    started.clear()
    FAILING.clear()
    assert command("tiny", "--out", tmp_path).code == 1
    assert started == []
    assert command("tiny", "--out", tmp_path, "--retry").code == 0
    assert [cell.name for cell in started] == ["normalized, seed 1", "continued, seed 1"]


def test_equal_seconds_are_fitted_once(
    command: Command, started: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = dataclasses.replace(STUDY, budget="seconds", arms=(*STUDY.arms, Arm("short", length=0.5, rate=0.1)))
    monkeypatch.setattr(entry, "STUDIES", {"tiny": timed})
    measured: list[str] = []

    def measure(base: TeacherAndStudent, arm: TeacherAndStudent, rounds: int) -> dict[str, Any]:
        measured.append(arm[1].objective.tangent.mode)
        assert base[1].loop.instruments is False
        return {"pace": 2.0, "seconds": 0.2, "base_seconds": 0.1}

    monkeypatch.setattr(runner, "measure_pace", measure)
    command("tiny", "--out", tmp_path, "--seeds", 0)
    assert measured == ["clip"]  # the others take the base's steps
    results = load_results(tmp_path / "tiny-digits" / "results.json")
    iterations = {arm.name: results.of(arm.name)[0].iterations for arm in timed.arms if arm.student is not None}
    assert iterations == {"normalized": 100, "clipped": 50, "continued": 100, "short": 50}
    assert results.pace["clipped"]["pace"] == 2.0
    command("tiny", "--out", tmp_path, "--seeds", 0)
    assert measured == ["clip"]


def test_an_arm_whose_steps_cannot_be_taken_keeps_the_iterations_of_the_base(
    command: Command, started: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("no memory\nfor this")

    monkeypatch.setattr(entry, "STUDIES", {"tiny": dataclasses.replace(STUDY, budget="seconds")})
    monkeypatch.setattr(runner, "measure_pace", fail)
    result = command("tiny", "--out", tmp_path, "--seeds", 0, "--only", "clipped")
    assert "no step time of clipped; no memory\n" in result.out
    results = load_results(tmp_path / "tiny-digits" / "results.json")
    assert (results.of("clipped")[0].iterations, "clipped" in results.pace) == (100, False)


def test_arms_whose_steps_take_as_long_share_a_measurement() -> None:
    def timed(**changes: Any) -> Any:
        return pace.timed(runner.resolve_arm(tiny_base(), Arm("arm", {"objective.kind": "cd", **changes}), 0, "cpu"))

    coarse = timed(**{"objective.discrete.steps": 8})
    assert coarse == timed(**{"objective.discrete.steps": 1024, "optimizer.lr": 0.5, "loop.iterations": 7})
    assert coarse != timed(**{"objective.discrete.steps": 8, "objective.discrete.solver": "heun"})
    assert coarse != timed(**{"objective.discrete.steps": 8, "objective.discrete.initial_steps": 2})


def test_step_times_are_measured_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "ROUND_SECONDS", 0.02)
    base = tiny_base()
    student = dataclasses.replace(base.student, teacher="teacher")
    found = pace.measure_pace((base.teacher, student), (base.teacher, student), rounds=1)
    assert found["seconds"] > 0
    assert found["pace"] == pytest.approx(found["seconds"] / found["base_seconds"])  # of one round


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "unknown study 'nothing'; expected one of tiny, all or list"),
        (["tiny", "--only", "raw"], "no arm 'raw'; expected one of normalized, clipped, continued, solver"),
        (["tiny", "--base", "cifar"], "unknown base 'cifar'; expected one of digits, other"),
        (["tiny", "--teacher-preset", "digits"], "a base is named in two ways, or half"),
        (["tiny", "--base", "digits", "--teacher-preset", "digits", "--student-preset", "digits"], "two ways, or half"),
        (["tiny", "--teacher-preset", "digits", "--student-preset", "none"], "unknown preset 'none'"),
        (["tiny", "--jobs", "0"], "0 jobs, 2000 samples; expected at least 1 job"),
        (["tiny", "--device", "abacus"], "device 'abacus' cannot be used"),
        (["all", "--only", "clipped"], "--only with all studies"),
    ],
)
def test_what_cannot_be_run_is_said_in_a_line(command: Command, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = command(*arguments, "--out", tmp_path / "lab")
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "lab").exists()


def test_the_list_has_every_study(command: Command) -> None:
    assert command("list").out == "tiny           Normalized, clipped, continued (digits)\n"


def test_all_are_those_of_the_base(
    command: Command, started: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = dataclasses.replace(STUDY, name="more", bases=("other",))
    monkeypatch.setattr(entry, "STUDIES", {"tiny": STUDY, "more": more})
    assert command("all", "--out", tmp_path).code == 0
    assert (tmp_path / "tiny-digits").is_dir()
    assert not (tmp_path / "more-digits").exists()


def test_smoke_is_small(command: Command, started: list[Cell], tmp_path: Path) -> None:
    assert command("tiny", "--smoke", "--out", tmp_path).code == 0
    assert [cell.name for cell in started] == ["teacher, seed 0", "normalized, seed 0", "clipped, seed 0"]
    assert max(cell.config.loop.iterations for cell in started) <= 4
    assert {cell.num for cell in started} == {64}
    assert (tmp_path / "tiny-digits-smoke" / "figure.png").is_file()
    assert [arm.name for arm in load_results(tmp_path / "tiny-digits-smoke" / "results.json").study.arms] == [
        "normalized", "clipped"
    ]  # fmt: skip


def test_presets_and_data_make_a_base() -> None:
    base = choose_base(None, "img64-s-teacher", "img64-s-scd", "/data")[1]
    assert base.student.objective.kind == "scd"
    assert {base.teacher.data.source, base.student.data.source} == {"/data"}
    with pytest.raises(UserError, match="trains a teacher"):
        choose_base(None, "img64-s-teacher", "img64-s-teacher")


def test_interrupted_studies_leave_what_is_known(
    command: Command, started: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: float) -> None:
        if len(started) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(pool.time, "sleep", interrupt)
    monkeypatch.setattr(CellPool, "_is_free", lambda self, cell: len(started) < 3)
    result = command("tiny", "--out", tmp_path)
    assert result.code == 130
    results = load_results(tmp_path / "tiny-digits" / "results.json")
    assert [cell.status for cell in results.of("normalized").values()] == ["done", "missing"]
