"""trigflow bench measures every variant that works, says why others do not, and picks one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trigflow.deploy.measure import Measurement, measure, pick
from trigflow.models.model import load


def row(variant: str, batch: int, p50: float, difference: int = 0) -> Measurement:
    return Measurement(variant, batch, 5, p50, p50, p50, batch / p50 * 1e3, difference, 0.0)


def test_the_pick_is_fastest_over_all_batches_among_the_exact() -> None:
    rows = [
        row("plain", 1, 4.0), row("traced", 1, 1.0), row("onnx", 1, 2.0), row("int8", 1, 0.5, 1),
        row("plain", 64, 9.0), row("traced", 64, 8.0), row("onnx", 64, 5.0), row("int8", 64, 0.5, 9),
    ]  # fmt: skip
    assert pick(rows) == "traced"  # the ratios to the shortest multiply to 2 x 16; of onnx to 4 x 10
    assert pick(rows, tolerance=9) == "int8"
    assert pick([r for r in rows if r.variant != "traced"]) == "onnx"


def test_numbers_of_a_report_belong_together(student_folder: Path) -> None:
    report = measure(load(student_folder, "cpu"), batches=(1, 3), seconds=0.01, variants=("traced", "graph", "bf16"))
    assert [(r.batch, r.variant) for r in report.rows] == [
        (batch, name) for batch in (1, 3) for name in ("plain", "traced", "bf16")
    ]
    for r in report.rows:
        assert 0 < r.p50 <= r.p95 <= r.p99
        assert r.draws >= 5
        assert r.per_second == pytest.approx(r.batch * 1e3 / r.p50)
        assert r.difference <= (1 if r.variant == "traced" else 32)
    assert all((r.difference, r.changed) == (0, 0.0) for r in report.rows if r.variant == "plain")
    assert "CUDA" in report.skipped["graph"]
    assert report.pick in {"plain", "traced", "bf16"}


def test_command(cli: Callable[..., Any], student_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures" / "bench.json"
    result = cli(
        "bench", student_folder, "--batches", 1, "--seconds", 0.01, "--steps", 1, "--variants", "traced", "fp16",
        "--device", "cpu", "--json", out,
    )  # fmt: skip
    assert result.code == 0, result.err
    written = json.loads(out.read_text())
    assert written["steps"] == 1
    assert {r["variant"] for r in written["rows"]} == {"plain", "traced"}
    assert f"pick: {written['pick']}" in result.out
    assert "not measured: fp16: the variant fp16 on cpu" in result.out
    assert "images/s" in result.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--variants", "fastest"), "unknown variant 'fastest'"),
        (("--batches", "0"), "batch sizes"),
        (("--seconds", "0"), "seconds"),
        (("--seconds", "nan"), "seconds"),
        (("--threads", "0"), "threads"),
        (("--steps", "0"), "0 sampling steps"),
    ],
)
def test_bad_options_leave_in_one_line(
    cli: Callable[..., Any], student_folder: Path, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    out = tmp_path / "bench.json"
    result = cli("bench", student_folder, *options, "--json", out)
    assert result.code == 2
    assert said in result.err
    assert result.err.count("\n") == 1
    assert not out.exists()
