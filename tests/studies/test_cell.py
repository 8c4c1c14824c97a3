"""A cell trains, scores and says how it ended."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from studies import cell as cells
from studies.pool import is_held, lock_of
from studies.spec import Draw
from studies.study_plan import Cell, StudyPlan, expand
from tiny_study import STUDY, tiny_base
from trigflow.models.model import load
from trigflow.process import TrigFlow
from trigflow.runtime.files import write_json
from trigflow.samplers import Sampling
from trigflow.training.trainer import Trainer


@pytest.fixture(scope="module")
def plan() -> StudyPlan:
    return expand(STUDY, tiny_base(), STUDY.arms, (0,), num=20)


@pytest.fixture(scope="module")
def out(plan: StudyPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished teacher."""
    folder = tmp_path_factory.mktemp("lab")
    teacher = plan.cells[plan.teacher_of["normalized", 0]]
    assert cells.run_cell(described(teacher), folder)["status"] == "done"
    return folder


def described(cell: Cell, **changes: Any) -> dict[str, Any]:
    """The content of its cell.json, after a journey through it."""
    return {**json.loads(json.dumps(cell.description())), **changes}


def of(plan: StudyPlan, arm: str) -> Cell:
    return plan.cells[plan.of_arm[arm, 0]]


def test_a_cell_trains_and_scores(plan: StudyPlan, out: Path) -> None:
    result = cells.run_cell(described(of(plan, "normalized")), out)
    assert (result["status"], result["reason"], result["iterations"], result["skipped"]) == ("done", "", 6, 0)
    assert list(result["scores"]) == ["1", "2"]
    for steps, scores in result["scores"].items():
        assert scores["nfe"] == int(steps)
        assert math.isfinite(scores["fd"])
        assert 0 <= scores["precision"] <= 1
    assert result["scores"]["1"]["times"] is None
    assert len(result["scores"]["2"]["times"]) == 2  # searched
    assert len(result["training"]["tangent_norm_by_time"]) == 8
    assert result["training"]["grad_norm_max"] >= result["training"]["grad_norm_median"] > 0
    assert result["seconds"]["train"] > 0
    json.dumps(result, allow_nan=False)

    model = load(out / of(plan, "normalized").model, "cpu")  # an ordinary run folder
    assert model.kind == "consistency"
    assert model.origin["teacher"] == f"../../{of(plan, 'normalized').teacher}"


def test_the_search_covers_gamma_where_a_model_takes_any_jump() -> None:
    """The sample stands for its own time and gamma, and the distance is least at 0.9 and 0.5."""
    model: Any = SimpleNamespace(process=TrigFlow(), sampling=Sampling(jumps="any"), times={})
    model.sample = lambda num, times, gamma, **_: (times[1], gamma)
    reference: Any = SimpleNamespace(score=lambda drawn: SimpleNamespace(fd=(drawn[0] - 0.9) ** 2 + (drawn[1] - 0.5) ** 2))
    cells._search(model, reference, Draw(2, search=True), 20, 0)
    assert model.sampling.gamma == 0.5
    assert model.times[2][1] == pytest.approx(0.9, abs=0.01)


def test_what_a_search_has_found_is_for_its_draw_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = SimpleNamespace(kind="consistency", sampling=Sampling(jumps="any"), times={})
    seen: list[tuple[dict[int, Any], float]] = []

    def search(model: Any, *_: Any) -> None:
        model.times, model.sampling = {2: (1.5, 0.9)}, Sampling(jumps="any", gamma=0.5)

    def score(model: Any, *_: Any, **how: Any) -> dict[str, float]:
        seen.append((model.times, model.sampling.gamma))
        return dict.fromkeys(("fd", "fd_real", "precision", "recall", "nfe"), 1.0)

    monkeypatch.setattr(cells, "_search", search)
    monkeypatch.setattr(cells, "score", score)
    cells.score_draws(model, Any, [Draw(2, search=True), Draw(3)], 20, 0)  # type: ignore[arg-type]
    assert seen == [({2: (1.5, 0.9)}, 0.5), ({}, Sampling(jumps="any").gamma)]


def test_what_is_trained_is_not_trained_again(plan: StudyPlan, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cells.run_cell(described(of(plan, "normalized")), out)
    monkeypatch.setattr(Trainer, "step", None)
    drawn = cells.run_cell(described(of(plan, "normalized"), draws=[dataclasses.asdict(Draw(1))]), out)
    assert drawn["scores"]["1"]["fd"] == first["scores"]["1"]["fd"]
    solver = cells.run_cell(described(of(plan, "solver")), out)
    assert (solver["status"], solver["scores"]["2"]["nfe"]) == ("done", 2)


def test_a_student_starts_from_another(plan: StudyPlan, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells.run_cell(described(of(plan, "normalized")), out)
    seen: list[Any] = []
    begin = Trainer.__init__

    def watched(self: Trainer, *args: Any, **kwargs: Any) -> None:
        seen.append(kwargs["start"])
        begin(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "__init__", watched)
    assert cells.run_cell(described(of(plan, "continued")), out)["status"] == "done"
    theirs = load(out / of(plan, "normalized").model, "cpu").network.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in seen[0].network.state_dict().items())


def fresh(plan: StudyPlan, name: str, **changes: Any) -> dict[str, Any]:
    """A student of its own."""
    return described(of(plan, "normalized"), model=f"students/{name}", **changes)


def test_steps_that_are_not_finite_are_a_divergence(plan: StudyPlan, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def skip(self: Trainer) -> Any:
        self.iteration += 1
        self.guard.skipped += self.iteration % 2
        t = torch.ones(2)
        return {"grad_norm": math.nan}, {"t": t, "loss": t * math.nan}

    monkeypatch.setattr(Trainer, "step", skip)
    result = cells.run_cell(fresh(plan, "skipping"), out)
    assert result["status"] == "diverged"
    assert result["reason"] == "loss or gradient were not finite in 3 of 6 steps"
    assert result["scores"] == {}
    assert result["training"]["loss"] is None
    assert result["training"]["grad_norm_max"] is None
    json.dumps(result, allow_nan=False)


def test_weights_that_are_not_finite_are_a_divergence(plan: StudyPlan, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.step

    def broken(self: Trainer) -> Any:
        found = step(self)
        next(self.ema.network.parameters()).data.fill_(math.nan)
        return found

    monkeypatch.setattr(Trainer, "step", broken)
    result = cells.run_cell(fresh(plan, "broken"), out)
    assert result["status"] == "diverged"
    assert "ema not finite" in result["reason"]


def test_draws_no_better_than_noise_are_a_divergence(plan: StudyPlan, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "JUDGED_FROM", 6)
    assert cells.run_cell(described(of(plan, "normalized")), out)["status"] == "done"
    monkeypatch.setattr(cells, "score_draws", lambda *_: {"1": {"fd": 900.0}, "2": {"fd": 800.0}})
    result = cells.run_cell(described(of(plan, "normalized")), out)
    assert result["status"] == "diverged"
    assert result["reason"].startswith("Frechet distance 800.0, that of noise is ")
    assert result["scores"]["2"]["fd"] == 800.0
    monkeypatch.setattr(cells, "JUDGED_FROM", 7)
    assert cells.run_cell(described(of(plan, "normalized")), out)["status"] == "done"


def test_an_exception_is_a_failure_with_its_reason(plan: StudyPlan, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Trainer) -> Any:
        raise RuntimeError("out of luck\nand a second line")

    monkeypatch.setattr(Trainer, "step", fail)
    result = cells.run_cell(fresh(plan, "failing"), out)
    assert (result["status"], result["reason"]) == ("failed", "RuntimeError: out of luck")
    gone = cells.run_cell(fresh(plan, "orphan", teacher="teachers/none"), out)
    assert gone["status"] == "failed"
    assert "teachers/none' does not exist; expected" in gone["reason"]


def test_figures_are_means_of_the_end_of_the_log() -> None:
    lines: list[dict[str, Any]] = [
        {"iteration": i, "skipped": 0, "lr": 1.0, "images_per_second": 4.0, "grad_norm": norm, "loss": loss,
         "by_time": [loss, None]}
        for i, norm, loss in ((2, 1.0, 9.0), (4, None, 9.0), (6, 8.0, 9.0), (8, 3.0, 9.0), (10, 2.0, 9.0), (12, 2.0, 9.0),
                        (14, 2.0, 1.0), (16, 2.0, 2.0))
    ]  # fmt: skip
    figures = cells.training_figures(lines)
    assert figures == {
        "grad_norm": 2.0, "loss": 1.5, "by_time": [1.5, None], "grad_norm_max": 8.0, "grad_norm_median": 2.0
    }  # fmt: skip
    assert cells.training_seconds(lines, batch_size=8) == 32.0


def test_main_leaves_a_finished_cell_alone_and_waits_for_the_lock(
    plan: StudyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = of(plan, "normalized")
    folder = tmp_path / "cells" / cell.key
    folder.mkdir(parents=True)
    write_json(folder / "cell.json", cell.description())

    def run(*_: Any) -> dict[str, Any]:
        assert is_held(lock_of(tmp_path, cell.model))
        return {"status": "done"}

    monkeypatch.setattr(cells, "run_cell", run)
    assert cells.main([str(folder)]) == 0
    assert not is_held(lock_of(tmp_path, cell.model))
    monkeypatch.setattr(cells, "run_cell", lambda *_: {"status": "done again"})
    assert cells.main([str(folder)]) == 0
    assert json.loads((folder / "result.json").read_text()) == {"status": "done"}

    (folder / "result.json").unlink()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as other, contextlib.ExitStack() as held:
        other.submit(held.enter_context, lock_of(tmp_path, cell.model)).result()
        monkeypatch.setattr("time.sleep", interrupted)
        assert cells.main([str(folder)]) == 130
        other.submit(held.close).result()
    assert not (folder / "result.json").exists()


def test_the_largest_gradient_is_that_of_the_instruments_where_there_are_any() -> None:
    common = {"skipped": 0, "lr": 1.0, "images_per_second": 4.0}
    lines = [
        {"iteration": 2, "grad_norm": 3.0, "grad_norm_max": 9.0, **common},
        {"iteration": 4, "grad_norm": 2.0, "grad_norm_max": 4.0, **common},
    ]
    assert cells.training_figures(lines)["grad_norm_max"] == 9.0
