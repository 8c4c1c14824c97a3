"""A multistep student from the command line: distilled, drawn, measured, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]
FEW = ["--loop.iterations", 2, "--loop.batch-size", 8, "--loop.sample-every", 0, "--quiet"]


def test_from_distilling_to_measuring(cli: Cli, teacher_folder: Path, tmp_path: Path) -> None:
    student, grid = tmp_path / "student", tmp_path / "grid.png"
    result = cli("distill", teacher_folder, "--out", student, "--objective.segments", 4, *FEW)
    assert result.code == 0, result.err
    assert f"trigflow sample {student} --steps 4" in result.out
    assert cli("sample", student, "--out", grid, "--num", 4, "--quiet").code == 0
    again = tmp_path / "again.png"
    assert cli("sample", student, "--out", again, "--num", 4, "--steps", 4, "--quiet").code == 0
    assert grid.read_bytes() == again.read_bytes()
    report = tmp_path / "report.json"
    assert cli("evaluate", student, "--num", 20, "--out", report, "--quiet").code == 0
    assert json.loads(report.read_text(encoding="utf-8"))["nfe"] == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--objective.segments", 0], "objective.segments is 0; expected at least 1; correct the setting"),
        (["--objective.segments", 4, "--objective.kind", "scd-vsd"], "objective.segments is 4; expected 1, "),
        (["--objective.segments", 999], "999 segments of the quarter circle"),
    ],
)
def test_settings_that_make_no_sense(options: list[Any], words: str, cli: Cli, teacher_folder: Path, tmp_path: Path) -> None:
    result = cli("distill", teacher_folder, "--out", tmp_path / "run", *options, *FEW)
    assert result.code == 2
    assert result.err.startswith("trigflow: error: ")
    assert words in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_another_number_of_steps_writes_nothing(cli: Cli, teacher_folder: Path, tmp_path: Path) -> None:
    student, grid = tmp_path / "student", tmp_path / "grid.png"
    cli("distill", teacher_folder, "--out", student, "--objective.segments", 2, *FEW)
    result = cli("sample", student, "--out", grid, "--num", 4, "--steps", 1, "--quiet")
    assert result.code == 2
    assert "1 steps for a multistep model of 2 segments; expected 2 steps, one for each; drop --steps" in result.err
    assert not grid.exists()
