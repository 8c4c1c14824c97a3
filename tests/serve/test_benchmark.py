"""The benchmark of the server says what was measured and whether it is enough."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from scripts import load_script
from serve.helpers import student
from trigflow.deploy import Engine


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    before = list(sys.path)
    module = load_script("serve")
    yield module
    sys.path[:] = before


def result(**changes: Any) -> dict[str, Any]:
    measured = {"frames": 31.0, "p95": 49.0, "ratio": 0.81, "errors": 0, "growth": 0.04, "wait": 9_999.0} | changes
    return {
        "viewer": {"frames_per_second": measured["frames"], "latency_ms": {"p95": measured["p95"]}},
        "throughput": {"api_over_network": measured["ratio"]},
        "crowd": {
            "server_errors": measured["errors"],
            "memory_growth": measured["growth"],
            "queue_ms": {"p99": measured["wait"]},
        },
    }


def test_bars(benchmark: ModuleType) -> None:
    assert [bar["met"] for bar in benchmark.bars(result())] == [True] * 6
    worse = {"frames": 29.0, "p95": 51.0, "ratio": 0.79, "errors": 1, "growth": 0.06, "wait": 10_001.0}
    for i, (name, value) in enumerate(worse.items()):
        bars = benchmark.bars(result(**{name: value}))
        assert [bar["met"] for bar in bars] == [j != i for j in range(6)]
        assert bars[i]["measured"] == value


def test_the_network_alone_is_evaluated_as_the_server_does(benchmark: ModuleType) -> None:
    model = student()
    seen: list[Any] = []
    model.network.register_forward_hook(lambda *given: seen.append(given[1]))
    engine = Engine(model, steps=benchmark.STEPS, variant="traced")
    engine.settle(benchmark.BATCH)
    seen.clear()
    benchmark.network_alone(engine.model)(0)
    benchmark.network_alone(model)(0)
    assert [len(x) for x, _ in seen] == [benchmark.BATCH] * benchmark.STEPS


def test_without_a_run_it_says_how_to_make_one(benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["serve.py", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="trigflow demo --out"):
        benchmark.main()
