"""Conditions of a data set beside its classes, told to a network of the user's own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training.tiny import differing, digits, state_of, tiny_config
from trigflow import UserError, load
from trigflow.conditions import Classes, Numbers
from trigflow.data import ImageDataset
from trigflow.training.trainer import Trainer

NULL = torch.tensor([9.0, -9.0])
"""No wind."""


class Windy(nn.Module):
    """`F(x, t, label, wind)`, which can do without both, or `F(x, t, label, wind, guidance)`."""

    def __init__(self, *more: str) -> None:
        super().__init__()
        self.linear = nn.Linear(66 + 2 + len(more), 64)
        self.embedding = nn.Embedding(11, 64)
        self.takes = frozenset({"label", "wind", *more})
        self.null = {"label": torch.tensor(10), "wind": NULL}

    def forward(self, x: Tensor, t: Tensor, label: Tensor, wind: Tensor, guidance: Tensor | None = None) -> Tensor:
        parts = [x.flatten(1), torch.cos(t)[:, None], torch.sin(t)[:, None], wind]
        parts += [] if guidance is None else [guidance[:, None]]
        return torch.tanh(self.linear(torch.cat(parts, dim=1)) + self.embedding(label)).reshape(x.shape)


def windy_digits(n: int = 100) -> ImageDataset:
    wind = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    return dataclasses.replace(digits(n), conditions={"wind": wind})


def make(folder: Path, changes: dict[str, Any] | None = None, *more: str, **kwargs: Any) -> Trainer:
    torch.manual_seed(0)
    return Trainer(
        tiny_config({"loop.iterations": 3, **(changes or {})}), folder, network=Windy(*more), dataset=windy_digits(),
        progress=False, **kwargs,
    )  # fmt: skip


def test_a_model_understands_what_its_data_told(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    before = state_of(trainer)
    model = trainer.run()
    learned = {name for name in before if name.startswith("network.")}
    assert learned <= set(differing(before, state_of(trainer)))
    assert model.spec.conditioning.takes == ("wind",)
    assert model.conditioner.inputs["wind"] == Numbers("wind", (2,))
    assert model.conditioner.inputs["label"] == Classes(10, tuple("0123456789"))

    again = load(tmp_path, "cpu", network=Windy())
    assert again.conditioner == model.conditioner
    still, east, west = (
        again.sample(4, steps=3, conditions=told) for told in (None, {"wind": [3.0, 0.0]}, {"wind": [-3.0, 0.0]})
    )
    assert torch.equal(east, model.sample(4, steps=3, conditions={"wind": [3.0, 0.0]}))
    assert not torch.equal(east, west)
    assert not torch.equal(still, east)
    in_turn = again.sample(4, steps=3, conditions={"wind": [[3.0, 0.0], [-3.0, 0.0]]})
    for row, expected in enumerate((east, west, east, west)):
        apart = (in_turn[row].int() - expected[row].int()).abs()  # not in the same place of a batch
        assert int(apart.max()) <= 1
    with pytest.raises(UserError, match=r"wind of shape .*; expected finite numbers of shape \(2,\)"):
        again.sample(4, steps=3, conditions={"wind": [1.0, 2.0, 3.0]})
    with pytest.raises(UserError, match=r"^rain for .*; expected labels, wind; leave rain out$"):
        again.sample(4, steps=3, conditions={"rain": 1.0})


def test_both_are_left_out_under_one_mask(tmp_path: Path) -> None:
    trainer = make(tmp_path, {"objective.label_dropout": 0.4})
    data, indices = windy_digits(), torch.arange(100).repeat(20)
    batch = trainer.batches.draw(indices, torch.Generator().manual_seed(0))
    label, wind = batch["condition.label"], batch["condition.wind"]
    without = label == 10
    assert float(without.double().mean()) == pytest.approx(0.4, abs=0.03)
    assert torch.equal((wind == NULL).all(1), without)
    assert data.labels is not None
    assert torch.equal(label[~without], data.labels[indices][~without])
    assert torch.equal(wind[~without], data.conditions["wind"][indices][~without])
    none = make(tmp_path / "none", {"objective.label_dropout": 0.0})
    batch = none.batches.draw(indices, torch.Generator().manual_seed(0))
    assert torch.equal(batch["condition.wind"], data.conditions["wind"][indices])


def test_a_run_is_resumed(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole")
    whole.run()
    part = make(tmp_path / "part")
    part.step()
    part.save_checkpoint()
    rest = make(tmp_path / "part", resume=True)
    assert rest.iteration == 1
    rest.run()
    assert differing(state_of(whole), state_of(rest)) == []


def test_a_guided_student_of_a_windy_teacher(tmp_path: Path) -> None:
    """The teacher is guided away from no class and no wind."""
    teacher = make(tmp_path / "teacher").run()
    changes = {"objective.kind": "scd", "objective.guidance_max": 2.0, "teacher": "teacher"}
    trainer = make(tmp_path / "student", changes, "guidance", teacher=teacher)
    batch = trainer.batches.draw(torch.arange(16), torch.Generator().manual_seed(0))
    x, t, sd = batch["x0"], batch["t"], 0.5
    told = {name: batch[f"condition.{name}"] for name in ("label", "wind")}
    cond = sd * teacher.network(x / sd, t, **told)
    away = sd * teacher.network(x / sd, t, label=torch.full((16,), 10), wind=NULL.expand(16, 2))
    expected = away + batch["condition.guidance"][:, None, None, None] * (cond - away)
    torch.testing.assert_close(trainer.losses.teacher_velocity(batch)(x, t), expected, rtol=1e-4, atol=1e-5)
    model = trainer.run()
    assert (trainer.skipped, "guidance" in model.takes) == (0, True)
    east = model.sample(2, steps=1, guidance=1.5, conditions={"wind": [3.0, 0.0]})
    assert not torch.equal(east, model.sample(2, steps=1, guidance=1.5, conditions={"wind": [-3.0, 0.0]}))


def test_data_without_what_the_network_takes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the network takes wind and the data have no such condition; expected one row"):
        Trainer(tiny_config(), tmp_path / "run", network=Windy(), dataset=digits(), progress=False)
    assert not (tmp_path / "run").exists()
