"""Runs of every choice of the flow map: trained, drawn in one step and two, and resumed; and rollouts of score distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from training.tiny import differing, state_of, tiny_config, tiny_trainer, untrained_teacher
from trigflow.conditions import takes
from trigflow.models.model import Model, load
from trigflow.objectives import rollout_times
from trigflow.runtime.errors import UserError
from trigflow.training.config import from_dict, to_dict
from trigflow.training.log import read_metrics
from trigflow.training.trainer import Trainer

Changes = dict[str, Any]

AYF: Changes = {"objective.kind": "flow-map"}
SELF: Changes = {**AYF, "objective.velocity": "self", "objective.anchor": 0.5}
RCM: Changes = {"objective.kind": "scd-vsd", "objective.rollouts": 3, "objective.fake_weighting": "sine"}
CHOICES: dict[str, tuple[Changes, str]] = {
    "jumps any": (AYF, "any"),
    "lagrangian": ({**AYF, "objective.residual": "lagrangian"}, "any"),
    "lagrangian, guided": ({**AYF, "objective.residual": "lagrangian", "objective.guidance_max": 2.0}, "any"),
    "semigroup": ({**AYF, "objective.residual": "semigroup", "objective.anchor": 0.5}, "any"),
    "self": (SELF, "any"),
    "self, lagrangian": ({**SELF, "objective.residual": "lagrangian"}, "any"),
    "self, semigroup": ({**SELF, "objective.residual": "semigroup"}, "any"),
    "direction self": ({**AYF, "objective.direction": "self"}, "any"),
    "pairs of times": ({**AYF, "objective.ends": "pair", "objective.velocity": "data"}, "any"),
    "weighted by the error": ({**AYF, "objective.residual": "lagrangian", "objective.weighting": "error"}, "any"),
    "semi step": ({"objective.kind": "scd", "objective.semi_step": 1e-3}, "zero"),
    "semi step of any jump": ({**AYF, "objective.semi_step": 1e-3}, "any"),
    "anchored jumps to 0": ({"objective.kind": "sct", "objective.anchor": 0.5}, "zero"),
    "rollouts": (RCM, "zero"),
    "rollouts of any jump": ({**RCM, "objective.jumps": "any"}, "any"),
}


@pytest.fixture(scope="module")
def teacher() -> Model:
    return untrained_teacher()


def make(changes: Changes, folder: Path, teacher: Model, *, resume: bool = False) -> Trainer:
    """Of 4 iterations; one that follows the data or itself has no teacher."""
    distills = tiny_config({**changes, "teacher": "teacher"}).objective.distills
    given = {"loop.iterations": 4, "loop.log_every": 1, **changes}
    return tiny_trainer(folder, given, teacher=teacher if distills else None, resume=resume)


@pytest.mark.parametrize("name", CHOICES)
def test_a_run_learns_and_draws(name: str, teacher: Model, tmp_path: Path) -> None:
    changes, jumps = CHOICES[name]
    trainer = make(changes, tmp_path, teacher)
    before = state_of(trainer)
    trainer.run()
    lines = read_metrics(tmp_path)
    assert (trainer.skipped, [line["iteration"] for line in lines]) == (0, [1, 2, 3, 4])
    assert all(line[key] is not None for line in lines for key in ("weighted_loss", "loss", "grad_norm"))
    assert all(line["loss"] > 0 for line in lines[1:])
    after = state_of(trainer)
    assert all(bool(value.isfinite().all()) for value in after.values())
    changed = differing(before, after)
    assert all(entry in changed for entry in before if entry.startswith("network.") and entry.endswith("weight"))

    model = load(tmp_path, "cpu")
    assert (model.kind, model.sampling.jumps, model.default_steps()) == ("consistency", jumps, 2)
    assert ("end" in takes(model.network)) == (jumps == "any" or "objective.anchor" in changes)
    drawn = [model.sample(4, steps=steps) for steps in (1, 2)]
    assert all(images.shape == (4, 1, 8, 8) for images in drawn)
    assert not torch.equal(*drawn)
    if jumps == "any":
        assert not torch.equal(model.sample(4, steps=2, gamma=1.0), drawn[1])
    else:
        with pytest.raises(UserError, match="gamma 0 for this model; expected 1, "):
            model.sample(4, steps=2, gamma=0.0)


@pytest.mark.parametrize("name", ["lagrangian, guided", "self, semigroup", "semi step", "rollouts"])
def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(name: str, teacher: Model, tmp_path: Path) -> None:
    changes = CHOICES[name][0]
    whole = make(changes, tmp_path / "whole", teacher)
    whole.run()
    part = make(changes, tmp_path / "part", teacher)
    for _ in range(2):
        part.step()
    part.save_checkpoint()
    rest = make(changes, tmp_path / "part", teacher, resume=True)
    assert rest.iteration == 2
    rest.run()
    assert differing(state_of(whole), state_of(rest)) == []


@pytest.mark.parametrize("name", CHOICES)
def test_settings_survive_json(name: str) -> None:
    config = tiny_config({**CHOICES[name][0], "teacher": "teacher"})
    config.validate()
    assert from_dict(to_dict(config)) == config


def test_rollouts_have_one_step_more_each_iteration_in_turn(teacher: Model, tmp_path: Path) -> None:
    trainer = make(RCM, tmp_path, teacher)
    process = trainer.config.process
    for iteration, steps in enumerate((1, 2, 3, 1)):
        batch = trainer.batches.draw(torch.arange(8), torch.Generator().manual_seed(0), iteration=iteration)
        more = [f"rollout_{what}{k}" for k in range(1, steps) for what in "tz"]
        assert {key for key in batch if key.startswith("rollout")} == set(more)
        times = [process.t_max, *(float(batch[f"rollout_t{k}"][0]) for k in range(1, steps))]
        assert times == sorted(times, reverse=True)
        assert all(0 < t <= process.t_max for t in times)
    longest = rollout_times(process, 2, 3, torch.Generator().manual_seed(0))
    assert len(longest) == 3


def test_the_anchored_share_ends_where_it_begins_and_another_at_zero(teacher: Model, tmp_path: Path) -> None:
    trainer = make({**AYF, "objective.anchor": 0.25, "objective.to_zero": 0.4}, tmp_path, teacher)
    batch = trainer.batches.draw(torch.arange(4000) % 100, torch.Generator().manual_seed(0))
    t, end = batch["t"], batch["end"]
    assert float((t == end).double().mean()) == pytest.approx(0.25, abs=0.03)
    assert float((end[end < t] == 0).double().mean()) == pytest.approx(0.4, abs=0.03)
    share = (end / t)[(end < t) & (end > 0)]
    assert float(share.mean()) == pytest.approx(0.5, abs=0.02)  # even in [0, t]
    assert float(share.min()) >= 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"residual": "semigroup"}, "objective.anchor is 0.0; expected above 0 for the semigroup"),
        ({"velocity": "self"}, "objective.anchor is 0.0; expected above 0 for velocity self"),
        ({"residual": "lagrangian", "velocity": "data"}, "objective.velocity is data; expected teacher or self"),
        ({"residual": "lagrangian", "jumps": "segments"}, "objective.jumps is segments; expected any for the lagrangian"),
        ({"segments": 2}, "objective.segments is 2; expected 1 with jumps any"),
        ({"semi_step": 1.0}, r"objective.semi_step is 1.0; expected in \[0, 1\)"),
        ({"to_zero": 1.1}, r"objective.to_zero is 1.1; expected a share in \[0, 1\]"),
        ({"anchor": -0.1}, r"objective.anchor is -0.1; expected a share in \[0, 1\]"),
    ],
)
def test_choices_that_do_not_go_together(changes: Changes, words: str, tmp_path: Path) -> None:
    given = {**AYF, "teacher": "teacher", **{f"objective.{name}": value for name, value in changes.items()}}
    with pytest.raises(UserError, match=words):
        tiny_config(given).validate()
    with pytest.raises(UserError, match=words):
        tiny_trainer(tmp_path / "run", given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rollouts": 0}, "objective.rollouts is 0; expected at least 1"),
        ({"velocity": "data"}, "objective.velocity is data; expected teacher"),
    ],
)
def test_choices_of_score_distillation_that_make_no_sense(changes: Changes, words: str) -> None:
    given = {**RCM, "teacher": "teacher", **{f"objective.{name}": value for name, value in changes.items()}}
    with pytest.raises(UserError, match=words):
        tiny_config(given).validate()
