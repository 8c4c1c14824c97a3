"""What a run tells while it trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from training.tiny import tiny_config
from trigflow.training import report as report_module
from trigflow.training.config import GuardConfig
from trigflow.training.guard import Guard
from trigflow.training.report import Report

FOUR: dict[str, Any] = {"loop.iterations": 10, "loop.log_every": 4, "loop.batch_size": 8}


def figures(loss: float) -> dict[str, torch.Tensor]:
    return {"t": torch.tensor([0.1, 1.5]), "loss": torch.full((2,), loss)}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its one item is the time, in seconds."""
    now = [100.0]
    monkeypatch.setattr(report_module, "time", type("Clock", (), {"perf_counter": lambda: now[0]}))
    return now


@pytest.fixture
def report(tmp_path: Path, clock: list[float]) -> Report:
    return Report(tmp_path, tiny_config(FOUR), 0, show=False)


def test_lines_are_due_every_few_steps_and_after_the_last(report: Report) -> None:
    assert [i for i in range(1, 11) if report.due(i)] == [4, 8, 10]


def test_a_line_is_about_the_steps_since_the_one_before(report: Report, clock: list[float], tmp_path: Path) -> None:
    guard = Guard(GuardConfig())
    for i, loss in enumerate((1.0, 2.0, 3.0, 6.0, 10.0, 20.0), start=1):
        clock[0] += 0.5
        report.add(i, figures(loss))
        if i in (4, 6):
            guard.skipped = i // 2
            report.write(i, {"grad_norm": float(i), "loss": 9.0}, {"measured": 0.25}, guard, 0.1)
    report.close()
    first, second = lines(tmp_path)
    assert (first["iteration"], second["iteration"]) == (4, 6)
    assert (first["loss"], second["loss"]) == (3.0, 15.0)
    assert first["loss_by_time"] == [3.0, *[None] * 6, 3.0]
    assert (first["grad_norm"], second["grad_norm"], first["measured"]) == (4.0, 6.0, 0.25)
    assert (first["skipped"], second["skipped"]) == (2, 3)
    assert first["images_per_second"] == pytest.approx(16.0)
    assert (first["data_wait"], second["data_wait"]) == (pytest.approx(0.05), pytest.approx(0.1))


def test_going_back_drops_later_lines_and_what_was_not_told(report: Report, clock: list[float], tmp_path: Path) -> None:
    guard = Guard(GuardConfig())
    for i in range(1, 7):
        clock[0] += 1
        report.add(i, figures(float(i)))
        if i in (2, 4):
            report.write(i, {}, {}, guard, 0.0)
    report.go_back(3)
    clock[0] += 1
    report.add(4, figures(50.0))
    report.write(4, {}, {}, guard, 0.0)
    report.close()
    assert [(line["iteration"], line["loss"]) for line in lines(tmp_path)] == [(2, 1.5), (4, 50.0)]
    assert lines(tmp_path)[1]["images_per_second"] == pytest.approx(8.0)


def test_the_bar_says_what_went_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(tmp_path, tiny_config(FOUR), 3, show=True)
    guard = Guard(GuardConfig())
    guard.spikes = 2
    report.add(4, figures(0.5))
    report.write(4, {}, {}, guard, 0.0)
    report.close()
    said = capsys.readouterr().err
    assert "teacher" in said
    assert "4/10" in said
    assert "loss=0.5000, spikes=2, data_wait=0%" in said
