"""A network that is told something of one's own: where a spot of light is to be, two numbers for each picture.

    trigflow train --plugin examples/own_condition.py --preset spots --out runs/spots
    trigflow sample runs/spots --plugin examples/own_condition.py --conditions centre=0.5,-0.5 --guidance 2 --out spots.png
    trigflow distill runs/spots --plugin examples/own_condition.py --preset spots --out runs/fast-spots
    trigflow serve runs/fast-spots --plugin examples/own_condition.py

The condition can be left out, so that classifier-free guidance has something to lead away from. Nothing in trigflow knows its
name. A teacher takes about a minute on one core.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trigflow.data
import trigflow.lab.recipes
import trigflow.networks
from trigflow.data import ImageDataset
from trigflow.data.config import DataConfig
from trigflow.lab.recipes import Recipe
from trigflow.networks import ConditioningConfig, NetworkConfig, PositionalEmbedding
from trigflow.objectives import TangentConfig, objective_of
from trigflow.training.config import LoopConfig, OptimizerConfig, RunConfig

SIDE = 8


def spots(n: int = 512) -> ImageDataset:
    """Spots of light on the dark, 8x8, with the place of each one's centre in [-1, 1]^2."""
    centre = 2 * torch.rand(n, 2, generator=torch.Generator().manual_seed(0)) - 1
    line = torch.linspace(-1, 1, SIDE)
    distance = (line[None, :, None] - centre[:, 1, None, None]) ** 2 + (line[None, None] - centre[:, 0, None, None]) ** 2
    light = (255 * torch.exp(-6 * distance)).round().to(torch.uint8)
    return ImageDataset("spots", light[:, None], conditions={"centre": centre})


@dataclass(frozen=True)
class SpotNetConfig(NetworkConfig):
    """Configuration of `SpotNet`."""

    axes: ClassVar[int | None] = 3
    width: int = 128
    """Hidden features."""
    dropout: float = 0.0
    """Of the hidden features."""
    conditioning: ConditioningConfig = field(default_factory=lambda: ConditioningConfig(takes=("centre",)))
    """It is told the centre."""


class SpotNet(nn.Module):
    """`F(x, t, centre)` of 8x8 pictures: three layers on pixels, time and centre; a centre of (2, 2) is none."""

    takes = frozenset({"centre"})

    def __init__(self, config: SpotNetConfig, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.null = {"centre": torch.full((2,), 2.0)}
        self.time = PositionalEmbedding(16)
        self.layer1 = nn.Linear(SIDE**2 + 18, config.width)
        self.layer2 = nn.Linear(config.width + 18, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.out = nn.Linear(config.width, SIDE**2)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, t: Tensor, centre: Tensor | None = None) -> Tensor:
        if centre is None:
            centre = self.null["centre"].to(x).expand(x.shape[0], 2)
        told = torch.cat([self.time(t), centre], dim=1)
        h = F.silu(self.layer1(torch.cat([x.flatten(1), told], dim=1)))
        h = F.silu(self.layer2(torch.cat([h, told], dim=1)))
        return self.out(self.dropout(h)).reshape(x.shape)


trigflow.data.register("spots", spots)
trigflow.networks.register("spotnet", SpotNetConfig, SpotNet)
TEACHER = RunConfig(
    data=DataConfig(source="spots"),
    network=SpotNetConfig(),
    optimizer=OptimizerConfig(lr=2e-3, schedule="cosine"),
    loop=LoopConfig(iterations=3000, batch_size=128, sample_every=1000),
)
trigflow.lab.recipes.register(
    "spots", Recipe(TEACHER, replace(TEACHER, objective=objective_of("scd", tangent=TangentConfig(warmup=300))))
)
