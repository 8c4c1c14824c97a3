"""The benchmark of whole demos: means and bars over seeds, and seeds added later."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from scripts import load_script


def report(seed: int) -> dict[str, Any]:
    """That of a demo whose ratio of distances grows by a tenth with the seed."""
    return {
        "seed": seed,
        "fd": {"teacher": 1.0, "student_1": 1.5, "student_2": 1.0 + seed / 10, "real": 0.5},
        "speedup_2": 30.0,
        "seconds": {"total": 300.0 + seed},
        "skipped_steps": {"teacher": 0, "student": seed},
    }


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_script("digits")

    class Demo:
        def __init__(self, folder: Path, recipe: str, seed: int) -> None:
            self.figures = report(seed)

        def table(self) -> str:
            return "a table"

    monkeypatch.setattr(module, "run_demo", Demo)
    monkeypatch.setattr("sys.argv", ["digits.py"])
    return module


def test_means_and_bars(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "new" / "seeds.json"
    script.run("digits", [0, 1, 2], None, script.quality_and_time, path)
    found = json.loads(path.read_text())
    assert found["ratio_2"]["mean"] == pytest.approx(1.1)
    assert found["ratio_2"]["standard_error"] == pytest.approx(0.1 / 3**0.5)
    assert found["skipped_steps"] == 3
    assert found["most_seconds"] == 302
    met = {bar["what"]: bar["met"] for bar in found["bars"]}
    assert not met["training steps that were not finite"]
    assert met["mean fd.student_1 / mean fd.teacher"]
    assert met["speedup_2, least of the seeds"]


def test_the_seconds_of_a_resumed_demo_are_not_those_of_a_whole_one(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo, path = script.run_demo, tmp_path / "seeds.json"

    def resumed(*args: Any, **kwargs: Any) -> Any:
        made = demo(*args, **kwargs)
        made.figures["resumed"] = kwargs["seed"] == 1
        return made

    monkeypatch.setattr(script, "run_demo", resumed)
    with pytest.raises(SystemExit, match=r"seeds \[1\] went on after an interruption.*--untimed"):
        script.run("digits", [0, 1], None, script.quality_and_time, path)
    assert not path.exists()
    script.run("digits", [0, 1], None, script.quality, path)
    assert json.loads(path.read_text())["resumed"] == [1]


def test_seeds_are_added_to_those_of_a_file(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "seeds.json"
    script.run("digits", [0, 2], None, script.quality, path, add=True)  # there is no file yet
    monkeypatch.setattr("sys.argv", ["digits.py", "--add"])
    script.run("digits", [1, 2], None, script.quality, path, add=True)
    found = json.loads(path.read_text())
    assert found["reports"] == [report(seed) for seed in (0, 1, 2)]
    assert found["ratio_2"]["each"] == pytest.approx([1.0, 1.1, 1.2])
    assert found["command"] == "python benchmarks/digits.py; python benchmarks/digits.py --add"

    path.write_text(json.dumps({**found, "machine": {"processor": "Abacus"}}))
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="expected the same; run all seeds anew"):
        script.run("digits", [3], None, script.quality, path, add=True)
    assert path.read_bytes() == before
