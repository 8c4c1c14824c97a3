"""The script for machines with CUDA, at toy size on whatever there is, and the page that is made of its results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import programs

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def program(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return programs.run([BENCHMARKS / name, *arguments], environment=environment)


def test_parts_at_toy_size(tmp_path: Path) -> None:
    done = program("gpu.py", "--dry", "--parts", "steps edm2-s", "drawing", "attention", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert set(result["parts"]) == {"steps edm2-s", "drawing", "attention"}
    for part in result["parts"].values():
        assert "ended" not in part
        assert part.get("failures", []) == []
    (case,) = result["parts"]["steps edm2-s"]["cases"]
    assert case["over_plain"]["plain"] == 1
    assert case["tangent_against_func"]["sct engine"] < 0.05  # bf16
    (shape,) = result["parts"]["attention"]["shapes"]
    if sys.platform == "linux":  # where triton is
        assert shape["methods"]["fused, backward"]["tangent_error"] < 0.02  # bf16
    assert result["environment"]["torch"]


def test_the_page_is_made_of_the_results() -> None:
    done = program("gpu_page.py", "--check")
    assert done.returncode == 0, "docs/gpu.md is not up to date; run: python benchmarks/gpu_page.py"
