"""Small models of random weights, so that every input of the network shows in what is drawn."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from training.tiny import change, digits, digits_config, model_from
from trigflow.conditions import Classes, Conditioner, Numbers
from trigflow.models.model import Kind, Model
from trigflow.models.outside import model_of
from trigflow.networks import build
from trigflow.objectives import objective_of
from trigflow.training.config import RunConfig


def student(
    changes: dict[str, Any] | None = None, *, kind: Kind = "consistency", times: dict[int, tuple[float, ...]] | None = None
) -> Model:
    """A class-conditional student of digits; `changes` are settings by dotted name, as `{"objective.segments": 4}`."""
    config: RunConfig = digits_config({"objective.kind": "scd", "network.mult": (1,), "teacher": "teacher", **(changes or {})})
    config = change(config, {name: value for name, value in (changes or {}).items() if name.startswith("network.")})
    conditioning = dataclasses.replace(config.network.conditioning, takes=config.objective.told)
    config = dataclasses.replace(config, network=dataclasses.replace(config.network, conditioning=conditioning))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = build(config.network, config.process.sigma_data)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    if kind == "diffusion":
        config = dataclasses.replace(config, objective=objective_of())
    model = model_from(network.eval().requires_grad_(False), config, digits())
    return dataclasses.replace(model, times=times or {})


NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def named(model: Model) -> Model:
    """The model with names for its ten classes that are no numbers."""
    return dataclasses.replace(model, conditioner=Conditioner.of_classes(10, NAMES))


class Windy(nn.Module):
    """A network of one's own that takes two numbers, `wind`, beside the class, and can do without both."""

    takes = frozenset({"label", "wind"})

    def __init__(self) -> None:
        super().__init__()
        self.null = {"label": torch.tensor(10), "wind": torch.zeros(2)}
        self.label = nn.Embedding(11, 4)
        self.linear = nn.Linear(7, 4)
        self.inp = nn.Conv2d(1, 4, 3, padding=1)
        self.out = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor, wind: Tensor) -> Tensor:
        told = torch.cat([self.label(label), t[:, None], wind], dim=1)
        return self.out(torch.tanh(self.inp(x)) * self.linear(told)[:, :, None, None])


def windy(kind: Kind = "consistency") -> Model:
    """A model of 8x8 pictures that is told a class, by number or name, and the wind; (1, -1) where nobody says it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        network = Windy()
    told = Conditioner({"label": Classes(10, NAMES), "wind": Numbers("wind", (2,), (1.0, -1.0))})
    return model_of(network, (1, 8, 8), num_classes=10, class_names=NAMES, conditioner=told, kind=kind)
