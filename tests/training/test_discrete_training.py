"""Discrete-time consistency under the trainer: what reaches the loss, its settings, and resuming."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from training.tiny import differing, state_of, tiny_config, tiny_trainer, untrained_teacher
from trigflow.objectives import DiscreteConfig, discrete, discrete_loss
from trigflow.runtime.errors import UserError
from trigflow.training.config import from_dict, to_dict

CD = {"objective.kind": "cd", "objective.discrete": DiscreteConfig(steps=8)}
CT = {"objective.kind": "ct", "objective.discrete": DiscreteConfig(steps=8)}
ECT = {"objective.kind": "ct", "objective.discrete": DiscreteConfig(schedule="ect", q=4, stages=3)}
HEUN = {"objective.kind": "cd", "objective.discrete": DiscreteConfig(steps=8, solver="heun", distance="huber")}


@pytest.mark.parametrize("changes", [CD, CT, ECT, HEUN], ids=["cd", "ct", "ect", "heun"])
def test_a_student_is_trained_and_draws(changes: dict[str, Any], tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", {**changes, "loop.accumulate": 2}, teacher=untrained_teacher())
    before = state_of(trainer)
    model = trainer.run()
    assert trainer.skipped == 0
    changed = differing(before, state_of(trainer))
    assert all(name in changed for name in before if name.startswith("network.") and name.endswith("weight"))
    assert model.kind == "consistency"
    assert model.sample(2, steps=2).shape == (2, 1, 8, 8)
    assert ("weight" in trainer.modules) == trainer.config.objective.discrete.learns_weight


def test_everything_reaches_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of the current iteration, the teacher with the batch's classes and scales, warmup, weighting."""
    changes = {
        "objective.kind": "cd",
        "objective.discrete": DiscreteConfig(steps=16, initial_steps=4, solver="heun"),
        "objective.guidance_max": 3.0,
    }
    trainer = tiny_trainer(tmp_path / "run", changes, teacher=untrained_teacher())
    calls: list[dict[str, Any]] = []

    def watched(network: Any, process: Any, x0: Any, noise: Any, t: Any, s: Any, **settings: Any) -> Any:
        calls.append({"network": network, "x0": x0, "t": t, "s": s, **settings})
        return discrete_loss(network, process, x0, noise, t, s, **settings)

    monkeypatch.setattr(discrete, "discrete_loss", watched)
    for _ in range(6):
        trainer.step()
    config = trainer.config.objective.discrete
    for i, call in enumerate(calls):
        grid = DiscreteConfig(steps=(4, 8, 16)[i // 2])
        t, s = grid.pairs(trainer.config.process, call["s"] + 1e-6, 0, 1)
        torch.testing.assert_close((call["t"], call["s"]), (t, s))
        assert call["r"] == min(1, i / 4)
        assert call["config"] is config
        assert call["weight"] is trainer.modules["weight"]
        told = call["conditions"]
        assert set(told) == {"label", "guidance"}
        assert told["guidance"].min() >= 1
        assert told["guidance"].max() > 1
        v = call["teacher"](call["x0"], call["t"])
        model = trainer.teacher
        assert model is not None
        expected = model.velocity({"label": told["label"]}, told["guidance"])(call["x0"], call["t"])
        torch.testing.assert_close(v, expected)


def test_dropout_is_shared_and_a_resumed_run_ends_the_same(tmp_path: Path) -> None:
    changes = {**ECT, "network.dropout": 0.4, "loop.checkpoint_every": 3}
    whole = tiny_trainer(tmp_path / "whole", changes)
    whole.run()
    first = tiny_trainer(tmp_path / "parts", changes)
    for _ in range(3):
        first.step()
    first.save_checkpoint()
    second = tiny_trainer(tmp_path / "parts", changes, resume=True)
    assert second.iteration == 3
    second.run()
    assert differing(state_of(whole), state_of(second)) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 10_001),
        ("initial_steps", 0),
        ("initial_steps", 65),
        ("q", 1.0),
        ("q", 0.0),
        ("q", math.nan),
        ("k", -1.0),
        ("b", math.inf),
        ("stages", 0),
        ("stages", 14),
        ("huber", 0.0),
    ],
)
def test_settings_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^objective\.discrete\.{name} is {value}; expected .+; correct the setting$"):
        tiny_config({"objective.kind": "ct", f"objective.discrete.{name}": value}).validate()


@pytest.mark.parametrize(
    ("name", "value"), [("steps", 10_000), ("initial_steps", 64), ("initial_steps", 1), ("stages", 13), ("k", 0.0)]
)
def test_the_ends_of_the_ranges_are_fine(name: str, value: Any) -> None:
    config = tiny_config({"objective.kind": "ct", f"objective.discrete.{name}": value})
    config.validate()
    assert from_dict(to_dict(config)) == config


def test_unknown_choices_are_refused() -> None:
    raw = to_dict(tiny_config({"objective.kind": "ct"}))
    raw["objective"]["discrete"]["solver"] = "euler"
    with pytest.raises(UserError, match="configuration cannot be read"):
        from_dict(raw)


def test_distillation_needs_a_teacher_and_training_does_not() -> None:
    tiny_config({"objective.kind": "ct"}).validate()
    with pytest.raises(UserError, match="distillation without a teacher"):
        tiny_config({"objective.kind": "cd"}).validate()


def test_a_fixed_weighting_takes_the_place_of_the_learned_one() -> None:
    def learns(changes: dict[str, Any]) -> bool:
        return tiny_config(changes).objective.learns_weight

    fixed = {"objective.discrete.distance": "huber"}
    assert learns({"objective.kind": "cd"})
    assert not learns({"objective.kind": "cd", **fixed})
    assert learns({"objective.kind": "cd", **fixed, "objective.discrete.weighting": "learned"})
    assert not learns({"objective.kind": "ct", "objective.discrete.schedule": "ect"})
    assert learns({"objective.kind": "scd"})
    assert not learns({"objective.kind": "cd", "objective.adaptive_weight": False})
