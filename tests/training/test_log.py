"""The log of a run: JSON lines that can be read back, and means by time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from trigflow.training.log import TIME_BINS, FigureWindow, MetricLog, read_metrics


def write(folder: Path, start: int, *iterations: int) -> None:
    log = MetricLog(folder, start)
    for i in iterations:
        log.write(i, {"loss": 1.0 / i, "loss_by_time": [None, 0.5]})
    log.close()


def test_lines_are_read_back(tmp_path: Path) -> None:
    write(tmp_path, 0, 2, 4)
    assert read_metrics(tmp_path) == [
        {"iteration": 2, "loss": 0.5, "loss_by_time": [None, 0.5]},
        {"iteration": 4, "loss": 0.25, "loss_by_time": [None, 0.5]},
    ]


def test_a_resumed_run_drops_the_lines_after_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 0, 2, 4, 6)
    write(tmp_path, 4, 6, 8)
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [2, 4, 6, 8]


def test_a_run_from_the_start_begins_an_empty_log(tmp_path: Path) -> None:
    write(tmp_path, 0, 2, 4)
    write(tmp_path, 0, 3)
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [3]


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, 0, 2, 4)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-10] + b"\xff\x00")
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [2]
    write(tmp_path, 3, 4)
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [2, 4]


def test_no_log_is_an_empty_one(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_becomes_null(value: float, tmp_path: Path) -> None:
    log = MetricLog(tmp_path)
    log.write(1, {"loss": value, "by_time": [1.0, value]})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"iteration": 1, "loss": None, "by_time": [1.0, None]}


def test_scalars_reach_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, 0, 2, 4)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(2, 0.5), (4, 0.25)]
    assert [e.value for e in events.Scalars("loss_by_time/1")] == [0.5, 0.5]


@pytest.mark.parametrize(("start", "kept"), [(0, [3]), (2, [2, 3]), (4, [2, 4, 3])])
def test_tensorboard_shows_the_lines_that_are_kept(start: int, kept: list[int], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, 0, 2, 4)
    write(tmp_path, start, 3)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == kept == [line["iteration"] for line in read_metrics(tmp_path)]


def test_means_overall_and_by_time() -> None:
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(200, generator=generator) * math.pi / 4  # the upper half of the bins stays empty
    t[0], t[1] = 0.0, math.pi / 2  # and both ends belong to a bin
    value = torch.randn(200, generator=generator)
    window = FigureWindow()
    for start in range(0, 200, 50):
        window.add({"t": t[start : start + 50], "loss": value[start : start + 50]})
    figures = window.flush()
    assert set(figures) == {"loss", "loss_by_time"}
    assert figures["loss"] == pytest.approx(value.double().mean().item())
    assert len(figures["loss_by_time"]) == TIME_BINS == 8
    for i, mean in enumerate(figures["loss_by_time"]):
        low, high = i * math.pi / 16, (i + 1) * math.pi / 16
        inside = [v for v, at in zip(value.tolist(), t.tolist(), strict=True) if low <= at < high or (i == 7 and at >= high)]
        assert mean == (pytest.approx(sum(inside) / len(inside)) if inside else None)
    assert figures["loss_by_time"][6] is None
    assert window.flush() == {}
