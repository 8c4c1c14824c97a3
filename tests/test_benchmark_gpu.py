"""The script for machines with CUDA, at toy size on whatever there is, and the page that is made of its results."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import programs
from scripts import BENCHMARKS


def program(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return programs.run([BENCHMARKS / name, *arguments], environment=environment)


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """`part(NAME)` is what a part of the script finds at toy size, in this process."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    record = importlib.import_module("gpu_parts.record").Record(tmp_path / "part.json", 1e9)

    def run(name: str) -> dict[str, Any]:
        importlib.import_module("gpu").function_of(name)(record, True)
        record.write()
        found: dict[str, Any] = json.loads(record.path.read_text())
        assert found.get("failures", []) == []
        return found

    return run


def test_the_script_at_toy_size(tmp_path: Path) -> None:
    """A part of it, whose process has an environment of its own; all of them are `benchmarks/gpu.py --dry`."""
    done = program("gpu.py", "--dry", "--parts", "attention", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert set(result["parts"]) == {"attention"}
    (part,) = result["parts"].values()
    assert "ended" not in part
    assert part.get("failures", []) == []
    (shape,) = part["shapes"]
    if sys.platform == "linux":  # where triton is
        assert shape["methods"]["fused, backward"]["tangent_error"] < 0.02  # bf16
    assert result["environment"]["torch"]


def test_steps_at_toy_size(part: Callable[[str], dict[str, Any]]) -> None:
    (case,) = part("steps edm2-s")["cases"]
    assert case["over_plain"]["plain"] == 1
    assert case["tangent_against_func"]["sct engine"] < 0.05  # bf16


def test_drawing_at_toy_size(part: Callable[[str], dict[str, Any]]) -> None:
    assert len(part("drawing")["engine"]) >= 2


def test_the_page_is_made_of_the_results() -> None:
    done = program("gpu_page.py", "--check")
    assert done.returncode == 0, "docs/gpu.md is not up to date; run: python benchmarks/gpu_page.py"
