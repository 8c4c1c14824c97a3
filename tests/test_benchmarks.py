"""The benchmark of tangents runs from its command line and reports what it says it reports."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import programs

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "tangent.py"


def command(*args: object) -> subprocess.CompletedProcess[str]:
    return programs.run([SCRIPT, *args])


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("benchmarks") / "new" / "tangent.json"
    done = command("--quick", "--cases", "unet-1m", "--repeats", 2, "--threads", 1, "--json", path)
    assert done.returncode == 0, done.stderr
    assert "unet-1m" in done.stdout
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_cases(result: dict[str, Any]) -> None:
    cases = {case["case"]: case for case in result["cases"] if case["device"] == "cpu"}
    assert set(cases) == {"unet-1m"}
    for case in cases.values():
        assert case["parameters"] > 1000
        assert case["repeats"] == 2
        assert set(case["seconds"]) == {"plain", "separate", "graph", "engine"}
        assert set(case["pairs"]) == {"plain", "separate", "graph"}
        half = {}
        for other, pair in case["pairs"].items():
            assert set(pair) == {other, "engine"}
            assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in pair.values())
            half[other] = sum(pair[other]) / sum(pair["engine"])  # the median of two is their mean
        assert case["step_ratio"] == pytest.approx(1 / half["plain"])
        assert case["speedup_vs_separate"] == pytest.approx(half["separate"])
        assert case["speedup_vs_graph"] == pytest.approx(half["graph"])
        for error in case["tangent_error"].values():
            assert error < 1e-5


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of resident memory are read from /proc")
def test_memory(result: dict[str, Any]) -> None:
    for case in result["cases"]:
        for peaks in case["memory"].values():
            assert min(peaks.values()) > 0
        assert 0.5 < case["memory_ratio"] < 3
        assert 0.5 < case["live_memory_ratio"] < 3
    chunked = result["attention_memory"]
    assert len(chunked["tokens"]) == len(chunked["chunked"]) == 4
    assert math.isfinite(chunked["growth"])


def test_bars(result: dict[str, Any]) -> None:
    bars = {bar["what"]: bar for bar in result["bars"]}
    assert len(bars) == 7
    step = bars["step_ratio, unet-1m"]
    named = next(case for case in result["cases"] if case["case"] == "unet-1m" and case["device"] == "cpu")
    assert step["measured"] == named["step_ratio"]
    assert step["met"] is (named["step_ratio"] <= 1.45)
    assert math.isfinite(result["dispatch"]["seconds"])
    assert result["machine"]["threads"] == 1
    assert result["command"].startswith("python benchmarks/tangent.py --quick")


@pytest.mark.parametrize("bad", [("--repeats", "0"), ("--quick", "--cases", "unet-large")])
def test_bad_options(bad: tuple[str, ...]) -> None:
    done = command(*bad)
    assert done.returncode == 2
    assert "error:" in done.stderr
