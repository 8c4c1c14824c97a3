"""The benchmark of sampling runs from its command line, on a tiny network where there is no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import programs

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "sampling.py"


def test_student_and_teacher_are_timed(tmp_path: Path) -> None:
    out = tmp_path / "new" / "sampling.json"
    done = programs.run([SCRIPT, "--quick", "--repeats", "2", "--variants", "eager", "--json", out])
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert [found["batch"] for found in result["batches"]] == [1, 2]
    for found in result["batches"]:
        entry = found["variants"]["eager"]
        assert len(entry["student"]["rounds"]) == 2
        assert entry["student"]["per_sample"] == pytest.approx(entry["student"]["seconds"] / found["batch"])
        assert entry["teacher_over_student"] == entry["teacher"]["seconds"] / entry["student"]["seconds"]


def test_unknown_networks_are_refused(tmp_path: Path) -> None:
    done = programs.run([SCRIPT, "--quick", "--network", "img99-s", "--json", tmp_path / "x.json"])
    assert done.returncode == 2
    assert "unknown EDM2 network 'img99-s'" in done.stderr
    assert not list(tmp_path.iterdir())
