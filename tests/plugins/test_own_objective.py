"""An objective from outside the package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import trigflow
from plugins.walk import command, evaluated, exported, resumed, served
from training.tiny import digits_config
from trigflow.training.trainer import Trainer

PLUGIN = "own_objective.py"
HUBER = ("--objective.kind", "huber", "--objective.bend", "0.5", "--objective.tangent.warmup", "2")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objective")
    Trainer(digits_config({"loop.iterations": 4}), folder / "teacher", progress=False).run()
    return resumed(PLUGIN, folder, "distill", folder / "teacher", *HUBER)


def test_the_run_folder_keeps_its_settings_and_the_digest(student: Path) -> None:
    config = json.loads((student / "config.json").read_text())
    assert config["objective"]["kind"] == "huber"
    assert config["objective"]["bend"] == 0.5
    assert [one["file"] for one in config["plugins"]] == [PLUGIN]
    assert trigflow.load(student, "cpu").sampling.kind == "flow_map"


def test_a_setting_that_makes_no_sense_is_one_line(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command(
            PLUGIN, "distill", student.parent / "teacher", "--out", tmp_path / "x", "--objective.kind", "huber",
            "--objective.bend", "-1",
        )  # fmt: skip
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "objective.bend" in said
    assert "-1" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_it_is_sampled_evaluated_and_exported(student: Path, tmp_path: Path) -> None:
    command(PLUGIN, "sample", student, "--num", 4, "--quiet", "--out", tmp_path / "digits.png")
    assert (tmp_path / "digits.png").is_file()
    evaluated(PLUGIN, student)
    exported(PLUGIN, student, ["x", "t", "label"])


def test_it_is_served(student: Path) -> None:
    drawn = served(student, {"count": 2, "labels": [3, 7], "seed": 3})
    assert np.array_equal(drawn, trigflow.load(student, "cpu").sample(2, labels=[3, 7], seed=3).numpy())
