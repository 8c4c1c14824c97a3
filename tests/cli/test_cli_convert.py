"""`trigflow convert`: the journey from a teacher with log time to a student, and one clear line for every mistake."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training.test_convert import save_run
from trigflow import load
from trigflow.samplers import Sampling

Cli = Callable[..., Any]
FAST = ["--iterations", "2", "--batch-size", "4", "--fit-iterations", "20", "--device", "cpu", "--quiet"]


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return save_run(tmp_path / "teacher", "edm2")


def test_from_an_imported_form_to_a_student(teacher: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "converted"
    result = cli("convert", teacher, "--out", out, "--modulation", "double", *FAST)
    assert result.code == 0, result.err
    assert "sigma" in result.out
    assert f"trigflow distill {out}" in result.out
    assert {"config.json", "model.json", "network.safetensors", "convert.json"} <= {path.name for path in out.iterdir()}
    report = json.loads((out / "convert.json").read_text())
    assert report["from"] == str(teacher)
    assert report["modulation"] == "double"
    assert load(out, "cpu").spec.modulation == "double"
    few = ["--loop.iterations", "2", "--loop.batch-size", "4", "--loop.sample-every", "0", "--loop.device", "cpu", "--quiet"]
    result = cli("distill", out, "--out", tmp_path / "student", *few)
    assert result.code == 0, result.err
    assert load(tmp_path / "student", "cpu").kind == "consistency"


def test_mistakes_are_one_line(teacher: Path, tmp_path: Path, cli: Cli) -> None:
    student = tmp_path / "student"
    dataclasses.replace(load(teacher, "cpu"), sampling=Sampling("flow_map")).save(student)
    assert cli("convert", teacher, "--out", tmp_path / "stable", *FAST, "--iterations", "0").code == 0
    out = tmp_path / "out"
    for args, message in (
        ([tmp_path / "nowhere"], "does not exist"),
        ([student], "student"),
        ([tmp_path / "stable"], "already"),
        ([teacher, "--data", tmp_path / "nothing"], "pass --data"),
        ([teacher, "--iterations", "-3"], "iterations is -3"),
        ([teacher, "--modulation", "triple"], "modulation"),
        ([], "required options"),
    ):
        result = cli("convert", *args, "--out", out, "--device", "cpu", "--quiet")
        assert result.code == 2, (args, result.out)
        assert result.err.count("\n") == 1
        assert message in result.err.lower(), result.err
        assert not out.exists()
