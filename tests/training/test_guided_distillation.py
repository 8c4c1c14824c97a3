"""Distillation from a guided teacher: what the student is trained toward, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from training.tiny import NETWORK, change, digits, tiny_config, untrained_teacher
from trigflow.conditions import Conditioner, takes
from trigflow.models.model import Model
from trigflow.networks import build
from trigflow.runtime.errors import UserError
from trigflow.samplers import Sampling
from trigflow.training.config import from_dict, read_config, to_dict
from trigflow.training.runs import distill
from trigflow.training.trainer import Trainer

GUIDED = {"objective.kind": "scd", "objective.guidance_max": 3.0, "loop.iterations": 2}
INTERVAL = (0.2, 1.0)


@pytest.fixture(scope="module")
def teacher() -> Model:
    return untrained_teacher()


@pytest.fixture(scope="module")
def negative() -> Model:
    """Another model of the same data, with other weights."""
    return untrained_teacher(seed=1)


def without_classes(model: Model) -> Model:
    network = change(NETWORK, {"conditioning.num_classes": 0})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        built = build(network)
        for parameter in built.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    built.eval().requires_grad_(False)
    return dataclasses.replace(model, network=built, spec=network, conditioner=Conditioner())


def student(folder: Path, teacher: Model, changes: dict[str, Any] | None = None, negative: Model | None = None) -> Trainer:
    config = dataclasses.replace(
        tiny_config({**GUIDED, **(changes or {})}), teacher="teacher", network=teacher.spec,
        negative=None if negative is None else "negative",
    )  # fmt: skip
    data = digits() if teacher.num_classes else dataclasses.replace(digits(), labels=None, class_names=())
    return Trainer(config, folder, teacher=teacher, negative=negative, dataset=data, progress=False)


def raw(model: Model, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    return 0.5 * model.network(x / 0.5, t, label=label)


@pytest.mark.parametrize("interval", [None, INTERVAL])
@pytest.mark.parametrize("auto", [False, True])
def test_the_student_follows_the_guided_teacher(
    auto: bool, interval: tuple[float, float] | None, teacher: Model, negative: Model, tmp_path: Path
) -> None:
    trainer = student(
        tmp_path / "run", teacher, {"objective.guidance_interval": interval}, negative if auto else None
    )  # fmt: skip
    batch = trainer.batches.draw(torch.arange(32), torch.Generator().manual_seed(0))
    x, t, label, scale = batch["x0"], batch["t"], batch["condition.label"], batch["condition.guidance"]
    sigma = 0.5 * torch.tan(t)
    inside = (sigma >= INTERVAL[0]) & (sigma <= INTERVAL[1]) if interval else torch.ones_like(t, dtype=torch.bool)
    assert 3 < inside.sum() < (32 if interval else 33)
    cond = raw(teacher, x, t, label)
    away = raw(negative, x, t, label) if auto else raw(teacher, x, t, torch.full_like(label, 10))
    guided = away + scale[:, None, None, None] * (cond - away)
    expected = torch.where(inside[:, None, None, None], guided, cond)
    torch.testing.assert_close(trainer.losses.teacher_velocity(batch)(x, t), expected, rtol=1e-4, atol=1e-5)


def test_a_student_of_autoguidance_without_classes(teacher: Model, negative: Model, tmp_path: Path) -> None:
    plain = without_classes(teacher)
    trainer = student(tmp_path / "run", plain, {}, without_classes(negative))
    model = trainer.run()
    assert "guidance" in model.takes
    assert model.num_classes == 0
    assert model.sample(2, guidance=2.5).shape == (2, 1, 8, 8)
    assert not torch.equal(model.sample(2, guidance=2.5), model.sample(2, guidance=2.5, seed=1))


def test_the_student_of_an_interval_takes_the_scale_alone(teacher: Model, tmp_path: Path) -> None:
    model = student(tmp_path / "run", teacher, {"objective.guidance_interval": INTERVAL}).run()
    assert "guidance" in model.takes
    assert model.sample(2, guidance=2.0).shape == (2, 1, 8, 8)
    for more in ({"guidance_interval": INTERVAL}, {"negative": teacher}):
        with pytest.raises(UserError, match="for a student that takes the scale as an input; expected the scale alone"):
            model.sample(2, guidance=2.0, **more)


def test_distill_records_the_negative(teacher: Model, negative: Model, tmp_path: Path) -> None:
    config = change(tiny_config(GUIDED), {"data.source": "digits"})
    model = distill(config, teacher, tmp_path / "run", negative=negative, progress=False)
    assert (model.origin["teacher"], read_config(tmp_path / "run").negative) == ("teacher", "negative")
    plain = distill(config, teacher, tmp_path / "plain", progress=False)
    assert read_config(tmp_path / "plain").negative is None
    weights = [torch.cat([p.flatten() for p in m.network.parameters()]) for m in (model, plain)]
    assert not torch.equal(*weights)


def test_settings_of_guidance_survive_json() -> None:
    config = dataclasses.replace(
        tiny_config({**GUIDED, "objective.guidance_interval": (0, 1.5)}), teacher="a", negative="b"
    )  # fmt: skip
    again = from_dict(to_dict(config))
    assert again == config
    assert again.objective.guidance_interval == (0, 1.5)


# Refusals ------------------------------------------------------------------------------------------------------------


def test_a_teacher_without_label_dropout_gives_no_guidance(teacher: Model, negative: Model, tmp_path: Path) -> None:
    untaught = dataclasses.replace(teacher, sampling=Sampling())
    with pytest.raises(UserError, match=r"label_dropout 0; expected one trained with label dropout, .*--negative RUN"):
        student(tmp_path / "run", untaught)
    with pytest.raises(UserError, match=r"label_dropout 0; expected one trained with label dropout"):
        untaught.sample(2, guidance=2.0)
    assert not (tmp_path / "run").exists()
    assert student(tmp_path / "auto", untaught, {}, negative).step()[0]["grad_norm"] > 0
    assert "guidance" not in takes(student(tmp_path / "plain", untaught, {"objective.guidance_max": 1.0}).network)
    assert untaught.sample(2, guidance=2.0, negative=negative).shape == (2, 1, 8, 8)


def test_negatives_that_do_not_fit(teacher: Model, negative: Model, tmp_path: Path) -> None:
    sd = dataclasses.replace(negative.process, sigma_data=0.7)
    other = dataclasses.replace(negative.codec, scale=9.0)
    shape = dataclasses.replace(negative.codec, shape=(3, 8, 8), mean=(0.0,) * 3)
    for wrong, words in (
        (
            dataclasses.replace(negative, sampling=Sampling("flow_map")),
            "the negative is a consistency model; expected a diffusion",
        ),
        (dataclasses.replace(negative, codec=shape), r"draws images of shape \(1, 8, 8\) and its negative \(3, 8, 8\)"),
        (dataclasses.replace(negative, process=sd), "has sigma_data 0.5 and its negative 0.7"),
        (dataclasses.replace(negative, conditioner=Conditioner.of_classes(3)), "has classes 10 and its negative 3"),
        (dataclasses.replace(negative, codec=other), "scales data by .* and its negative .*'scale': 9.0"),
    ):
        with pytest.raises(UserError, match=words):
            teacher.sample(2, guidance=2.0, negative=wrong)
        with pytest.raises(UserError, match=words):
            student(tmp_path / "run", teacher, {}, wrong)
    unconditional = without_classes(negative)
    assert teacher.sample(2, guidance=2.0, negative=unconditional).shape == (2, 1, 8, 8)


def test_a_negative_that_is_named_must_be_given(teacher: Model, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config(GUIDED), teacher="teacher", negative="runs/early")
    with pytest.raises(UserError, match=r"the negative 'runs/early' is not loaded; expected a model; pass negative="):
        Trainer(config, tmp_path / "run", teacher=teacher, dataset=digits(), progress=False)


def test_guidance_that_would_have_no_effect(teacher: Model, negative: Model, tmp_path: Path) -> None:
    for changes, other, words in (
        ({"objective.guidance_interval": INTERVAL}, None, "objective.guidance_interval while objective.guidance_max is 1"),
        ({}, negative, "a negative model while objective.guidance_max is 1"),
    ):
        with pytest.raises(UserError, match=words):
            student(tmp_path / "run", teacher, {**changes, "objective.guidance_max": 1.0}, other)
    for more in ({"guidance_interval": INTERVAL}, {"negative": negative}):
        with pytest.raises(UserError, match=r"with guidance 1, which is none; expected another scale; pass --guidance"):
            teacher.sample(2, **more)


FIXED = {"objective.guidance_max": 1.0, "objective.guidance": 2.0}
"""One scale, of which the student is not told."""


@pytest.mark.parametrize("interval", [None, INTERVAL])
@pytest.mark.parametrize("auto", [False, True])
def test_one_scale_is_guided_as_drawn_ones_are(
    auto: bool, interval: tuple[float, float] | None, teacher: Model, negative: Model, tmp_path: Path
) -> None:
    other = negative if auto else None
    trainer = student(tmp_path / "run", teacher, {**FIXED, "objective.guidance_interval": interval}, other)
    batch = trainer.batches.draw(torch.arange(32), torch.Generator().manual_seed(0))
    x, t = batch["x0"], batch["t"]
    expected = teacher.velocity({"label": batch["condition.label"]}, 2.0, interval=interval, negative=other)(x, t)
    torch.testing.assert_close(trainer.losses.teacher_velocity(batch)(x, t), expected, rtol=0, atol=0)
    assert "guidance" not in trainer.run().takes


def test_one_scale_of_a_teacher_that_has_no_guidance(teacher: Model, negative: Model, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"objective.guidance is 2.0 and the teacher is unconditional; .*; set objective.guidance to 1"
    ):
        student(tmp_path / "run", without_classes(teacher), FIXED)
    untaught = dataclasses.replace(teacher, sampling=Sampling())
    with pytest.raises(UserError, match=r"guidance for a model trained with objective.label_dropout 0"):
        student(tmp_path / "run", untaught, FIXED)
    assert student(tmp_path / "run", untaught, FIXED, negative).run().kind == "consistency"


def test_a_teacher_that_takes_the_scale_is_told_it_alone(teacher: Model, negative: Model, tmp_path: Path) -> None:
    told = teacher.network.takes | {"guidance"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher.network, "takes", told)
        for changes, other in ({**FIXED, "objective.guidance_interval": INTERVAL}, None), (FIXED, negative):
            with pytest.raises(UserError, match="for a teacher that takes the scale as an input; expected the scale alone"):
                student(tmp_path / "run", teacher, changes, other)


@pytest.mark.parametrize("interval", [(1.0, 1.0), (-1.0, 2.0), (0.5, float("inf")), (float("nan"), 1.0)])
def test_intervals_that_are_none(interval: tuple[float, float], teacher: Model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"objective.guidance_interval is .*; expected two finite numbers"):
        student(tmp_path / "run", teacher, {"objective.guidance_interval": interval})
    if interval[1] < float("inf"):
        with pytest.raises(UserError, match=r"guidance interval .*; expected two noise levels sigma"):
            teacher.sample(2, guidance=2.0, guidance_interval=interval)
