"""The model card: figures that are found, and text that nothing can break out of."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from deploy.students import student
from trigflow.conditions import Conditioner
from trigflow.deploy.card import figures_of, model_card, table
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import write_json


def test_figures_of_a_demo_and_of_evaluations(tmp_path: Path) -> None:
    report = {
        "fd": {"teacher": 0.5, "student_1": 0.7, "student_2": 0.6, "real": 0.8},
        "precision": {"student_2": 0.75},
        "nfe": {"teacher": 63, "student_1": 1, "student_2": 2},
        "num": 2000,
        "machine": {"processor": "secret"},
    }
    evaluation = {"fd": 0.4, "recall": 0.9, "nfe": 4, "num": 500, "features": "digits", "data": "/home/someone/d"}
    write_json(tmp_path / "report.json", report)
    write_json(tmp_path / "evaluation-4.json", evaluation)
    assert figures_of(tmp_path) == [
        {"model": "student", "nfe": 1, "fd": 0.7, "num": 2000},
        {"model": "student", "nfe": 2, "fd": 0.6, "precision": 0.75, "num": 2000},
        {"model": "teacher", "nfe": 63, "fd": 0.5, "num": 2000},
        {"model": "student", "nfe": 4, "fd": 0.4, "recall": 0.9, "num": 500, "features": "digits"},
    ]


def test_no_figures(tmp_path: Path) -> None:
    assert figures_of(tmp_path) == []
    rows = [
        {"variant": name, "batch": batch, "p50": 4.0 * batch, "difference": difference}
        for batch in (4, 1)
        for name, difference in (("plain", 0), ("graph", 1))
    ]
    measured = {"steps": 2, "device": "cpu", "pick": "graph", "rows": rows}
    (tmp_path / "bench.json").write_text(json.dumps(measured), encoding="utf-8")
    card = model_card(student(), figures_of(tmp_path), pictured=False)
    assert "| graph (the pick) | 2 | 1 | 4 | 1 | cpu |" in card
    assert "Not measured." in card
    (tmp_path / "bench.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="no measurement"):
        figures_of(tmp_path)
    (tmp_path / "bench.json").unlink()
    assert "Not measured." in model_card(student(), [], pictured=False)
    write_json(tmp_path / "evaluation.json", {"loss": 1})
    with pytest.raises(UserError, match="hold no Frechet distance"):
        figures_of(tmp_path)


def test_table_leaves_out_what_no_row_has() -> None:
    assert table([{"fd": 0.123456, "nfe": 1}, {"nfe": 2, "recall": 0.5}]).splitlines() == [
        "| evaluations | Frechet distance | recall |",
        "| --- | --- | --- |",
        "| 1 | 0.1235 |  |",
        "| 2 |  | 0.5 |",
    ]


def test_names_stay_on_their_line() -> None:
    model = student({"data.source": "/data/`rm`\n# Heading|"})
    model = dataclasses.replace(model, conditioner=Conditioner.of_classes(10, ("a`b", "c\n---\nd", *"23456789")))
    card = model_card(model, [], pictured=True)
    assert "# `'rm' # Heading/`, drawn in one or two steps" in card.splitlines()
    assert "Classes: 0 `a'b`, 1 `c --- d`, 2 `2`" in card
    assert card.splitlines().count("---") == 2  # those of the front matter
    assert "objective | continuous-time consistency distillation" in card


def test_an_unconditional_student_is_drawn_without_labels() -> None:
    model = student()
    conditioning = dataclasses.replace(model.spec.conditioning, num_classes=0)
    spec = dataclasses.replace(model.spec, conditioning=conditioning)
    card = model_card(dataclasses.replace(model, spec=spec, conditioner=Conditioner()), [], pictured=False)
    assert "pipe(num_inference_steps=2, generator=generator)" in card
    assert "no classes" in card
    assert "Classes:" not in card
