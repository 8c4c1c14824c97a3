"""Training with a teacher from elsewhere whose schedule has an end."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from training.tiny import NETWORK, change, digits, tiny_config
from trigflow.models.bridges import Bridge, DiscreteSchedule, FlowBridge, VPBridge
from trigflow.models.outside import model_of
from trigflow.process import Proposal, TrigFlow
from trigflow.training.trainer import Trainer

ALPHAS = torch.linspace(0.999, 0.3, 20)
"""Of a short schedule: the last step still has a third of the data."""
LATE = Proposal(0.5, 2.0)


class Zero(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.weight * x


def drawn(folder: Path, bridge: Bridge, kind: str) -> dict[str, Tensor]:
    """What a step of a distillation draws."""
    data = dataclasses.replace(digits(), labels=None, class_names=())
    more = {"objective.vsd_proposal": LATE} if kind == "scd-vsd" else {}
    config = tiny_config({"objective.kind": kind, "objective.proposal": LATE, "network.conditioning.num_classes": 0, **more})
    network = change(NETWORK, {"conditioning.takes": config.objective.told})
    config = dataclasses.replace(config, teacher="teacher", network=network, start="start")
    start = model_of(bridge, digits().shape)
    with pytest.MonkeyPatch.context() as patch:  # the student has weights of its own
        patch.setattr("trigflow.training.run.start_from", lambda *given: None)
        trainer = Trainer(config, folder, teacher=start, start=start, dataset=data, progress=False)
    return trainer.batches.draw(torch.arange(64), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["scd", "flow-map", "meanflow-distill", "scd-vsd", "cd"])
def test_no_time_lies_beyond_the_schedule_of_the_teacher(kind: str, tmp_path: Path) -> None:
    process = TrigFlow()
    bounded = VPBridge(Zero(), process, DiscreteSchedule(ALPHAS), scale=2.0)
    here, there = drawn(tmp_path / "a", bounded, kind), drawn(tmp_path / "b", FlowBridge(Zero(), process, scale=2.0), kind)
    last = math.atan(bounded.sigma_range[1] / process.sigma_data)
    for name in here.keys() - {"end"}:
        if name in ("t", "vsd_t", "fake_t"):
            assert bool((there[name] > last).any())
            assert torch.equal(here[name], there[name].clamp(max=last))
        else:
            assert torch.equal(here[name], there[name])
    assert "end" not in here or bool((here["end"] <= here["t"]).all())
