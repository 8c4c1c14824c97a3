"""What `trigflow doctor` and a study say of runs whose numbers went wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from studies import cell
from training.tiny import tiny_trainer
from trigflow.lab.doctor import Diagnosis, examine
from trigflow.runtime.errors import DivergedError
from trigflow.training.config import to_dict
from trigflow.training.log import read_metrics

RUN: dict[str, Any] = {"loop.iterations": 8, "loop.log_every": 1, "loop.checkpoint_every": 2, "guard.patience": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that went back once."""
    folder = tmp_path_factory.mktemp("doctor") / "run"
    trainer = tiny_trainer(folder, RUN)
    trainer.network.register_forward_hook(
        lambda module, args, out: out * math.nan if trainer.iteration > 3 and not trainer.guard.rollbacks else out
    )
    trainer.run()
    return folder


def diagnosed(folder: Path) -> dict[str, Diagnosis]:
    return {diagnosis.name: diagnosis for diagnosis in examine(folder).diagnoses}


def told(folder: Path, run: Path, settings: dict[str, str], **figures: Any) -> Path:
    """A copy of the run with other settings and with these figures in the last line of its log."""
    folder.mkdir()
    config = json.loads((run / "config.json").read_text())
    for name, value in settings.items():
        group, field = name.split(".")
        config[group][field] = value
    lines = read_metrics(run)
    for line in lines:
        line |= {"skipped": 0, "rollbacks": 0, "iteration": line["iteration"] * 100}
    lines[-1] |= figures
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def test_skipped_steps_and_rollbacks_are_found(run: Path) -> None:
    found = diagnosed(run)
    assert "3 of 8 steps were left out, the first by iteration 5" in found["non-finite"].evidence
    assert "It went back 1 times of at most 5, the first time to before iteration 5" in found["rollbacks"].evidence


@pytest.mark.parametrize(
    ("figures", "found"),
    [
        ({"loss_scale": 65536.0, "overflows": 5}, False),
        ({"loss_scale": 4.0, "overflows": 14}, True),
        ({"loss_scale": 65536.0, "overflows": 90}, True),
    ],
)
def test_gradients_that_do_not_fit_into_float16_are_found(
    figures: dict[str, Any], found: bool, run: Path, tmp_path: Path
) -> None:
    folder = told(tmp_path / "run", run, {"loop.precision": "fp16"}, **figures)
    assert ("loss-scale" in diagnosed(folder)) == found
    assert "loss-scale" not in diagnosed(told(tmp_path / "fp32", run, {}, **figures))


def test_many_spikes_are_found_and_few_are_not(run: Path, tmp_path: Path) -> None:
    assert "spikes" not in diagnosed(told(tmp_path / "few", run, {}, spikes=8))
    found = diagnosed(told(tmp_path / "many", run, {}, spikes=9))["spikes"]
    assert "9 of 800 steps" in found.evidence
    examined = examine(told(tmp_path / "off", run, {"guard.spikes": "off"}, spikes=0))
    assert "spikes" in [outcome.name for outcome in examined.not_seen]


def test_logs_from_before_there_were_counts_are_read(run: Path, tmp_path: Path) -> None:
    folder = told(tmp_path / "run", run, {})
    config = json.loads((folder / "config.json").read_text())
    del config["guard"]
    (folder / "config.json").write_text(json.dumps(config))
    lines = [{k: v for k, v in line.items() if k not in ("rollbacks", "spikes")} for line in read_metrics(folder)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    sound = [outcome.name for outcome in examine(folder).sound]
    assert {"non-finite", "rollbacks", "loss-scale", "spikes"} <= set(sound)


def test_a_run_that_gave_up_has_diverged_in_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gives_up(*args: Any) -> Any:
        raise DivergedError("iteration 7: 3 steps in a row; expected finite numbers; run 'trigflow doctor'")

    monkeypatch.setattr(cell, "trained", gives_up)
    config = to_dict(tiny_trainer(tmp_path / "made", {}).config)
    result = cell.run_cell({"config": config, "teacher": None, "start": None, "model": "m", "draws": [], "num": 4}, tmp_path)
    assert (result["status"], result["scores"]) == ("diverged", {})
    assert result["reason"].startswith("iteration 7")
