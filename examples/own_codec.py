"""Data of one dimension: waves of 64 values, drawn as curves.

    trigflow train --plugin examples/own_codec.py --preset waves --out runs/waves
    trigflow distill runs/waves --plugin examples/own_codec.py --preset waves --out runs/fast-waves
    trigflow sample runs/fast-waves --plugin examples/own_codec.py --out waves.png
    trigflow evaluate runs/fast-waves --plugin examples/own_codec.py

A codec says how stored data become x0, of zero mean and standard deviation `sigma_data`, and what a person gets of x0. A data
set says which codec its data have. A teacher takes about a minute on one core.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

import trigflow.codecs
import trigflow.data
import trigflow.lab.recipes
from trigflow.codecs import DrawnPictures
from trigflow.data import Dataset
from trigflow.data.config import DataConfig
from trigflow.lab.recipes import Recipe
from trigflow.networks import MLPConfig
from trigflow.objectives import TangentConfig, objective_of
from trigflow.training.config import LoopConfig, OptimizerConfig, RunConfig

LENGTH = 64


@trigflow.codecs.register
@dataclass(frozen=True)
class Waves(DrawnPictures):
    """Values, float32 `(b, length)`, to `x0 = scale * values`; drawn as curves on pictures of 32 x length.

    Attributes:
        shape: `(length,)`.
        scale: sigma_data over the deviation of the data.
        sigma_data: of x0.
    """

    shape: tuple[int, ...]
    scale: float
    sigma_data: float = 0.5
    kind: ClassVar[str] = "waves"
    pictured: ClassVar[bool] = True

    @property
    def drawn_shape(self) -> tuple[int, ...]:
        return (1, 32, *self.shape)

    def encode(self, stored: Tensor) -> Tensor:
        return self.scale * stored

    def stored(self, x0: Tensor) -> Tensor:
        return x0 / self.scale

    def decode(self, x0: Tensor) -> Tensor:
        return self.stored(x0)

    def pictures(self, drawn: Tensor) -> Tensor:
        height = torch.linspace(1.5, -1.5, 32, device=drawn.device)[None, :, None]
        line = (1 - 10 * (drawn[:, None, :] - height).abs()).clamp_min(0)
        return (255 * (1 - line)).round().to(torch.uint8)[:, None]

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "shape": list(self.shape), "scale": self.scale, "sigma_data": self.sigma_data}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Waves:
        return cls(tuple(state["shape"]), float(state["scale"]), float(state["sigma_data"]))


class WaveDataset(Dataset):
    """Waves, float32 `(n, length)`."""

    def codec(self, normalize: str, sigma_data: float) -> Waves:
        return Waves(self.shape, sigma_data / float(self.values.std()), sigma_data)


def waves(n: int = 1000) -> WaveDataset:
    """One to three periods of a sine, of any phase; the number of periods is the class."""
    generator = torch.Generator().manual_seed(0)
    periods, phase = torch.randint(3, (n,), generator=generator), 2 * math.pi * torch.rand(n, 1, generator=generator)
    x = torch.linspace(0, 2 * math.pi, LENGTH)[None]
    return WaveDataset("waves", torch.sin((periods[:, None] + 1) * x + phase), periods, ("one", "two", "three"))


trigflow.data.register("waves", waves)
TEACHER = RunConfig(
    data=DataConfig(source="waves"),
    network=MLPConfig(width=128, depth=3),
    optimizer=OptimizerConfig(lr=2e-3, schedule="cosine"),
    loop=LoopConfig(iterations=3000, batch_size=128, sample_every=1000),
)
trigflow.lab.recipes.register(
    "waves", Recipe(TEACHER, replace(TEACHER, objective=objective_of("scd", tangent=TangentConfig(warmup=300))))
)
