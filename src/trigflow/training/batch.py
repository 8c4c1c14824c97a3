"""Batches: stored data become x0, and everything random in a step is drawn."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trigflow.codecs import Codec
from trigflow.conditions import dropped, takes
from trigflow.data import Dataset
from trigflow.objectives import StepDraws
from trigflow.training.config import RunConfig
from trigflow.training.parallel import Share

Batch = dict[str, Tensor]
"""`x0` and `noise` `(b, *shape)`, the times `t` and what else the objective draws, and `condition.NAME` for each condition."""

CONDITION = "condition."
"""What the names of conditions begin with in a batch."""


def conditions_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The conditions of a batch, by name."""
    return {name.removeprefix(CONDITION): value for name, value in batch.items() if name.startswith(CONDITION)}


@dataclass(frozen=True)
class Batches:
    """Draws batches; the same indices and generator give the same batch.

    With several processes each has its share of it. All random numbers of the batch are drawn in every process, so that a
    sample has the same ones whatever the number of processes; data are read for the share alone.

    Attributes:
        config: data, objective and process settings.
        dataset: what is stored.
        codec: stored data to x0.
        network: what is trained: tells which conditions it takes, and what means "none" among them.
        device: where batches go; random numbers are drawn on the CPU.
        memory_format: order of images in memory.
        share: which samples of a batch this process has; None for all.
        latest: see `StepDraws`.
    """

    config: RunConfig
    dataset: Dataset
    codec: Codec
    network: object
    device: torch.device
    memory_format: torch.memory_format
    share: Share | None = None
    latest: float = math.inf

    def draw(self, indices: Tensor, generator: torch.Generator, stored: Tensor | None = None, iteration: int = 0) -> Batch:
        """The batch of these samples; flips, noise, times, left-out conditions and guidance scales from the generator. `stored`
        is what the data set stores of the samples of this process, where that has been read."""
        objective, process = self.config.objective, self.config.process
        b, rows = len(indices), None if self.share is None else self.share.rows()

        def own(values: Tensor) -> Tensor:
            return (values if rows is None else values[rows]).to(self.device)

        flip = torch.rand(b, generator=generator, dtype=torch.float32) < 0.5 if self.config.data.flip else None
        values, _ = self.dataset.batch(indices, flip=flip, generator=generator, rows=rows, stored=stored)
        x0 = self._ordered(self.codec.encode(values.to(self.device)))

        def noise() -> Tensor:
            like = x0 if rows is None else torch.empty(b, *x0.shape[1:], dtype=x0.dtype)
            return self._ordered(own(process.sample_noise(like, generator)))

        draws = StepDraws(b, process, generator, iteration, own, noise, self.latest)
        batch = {"x0": x0, "noise": noise(), **objective.draw(draws)}
        told = {name: value for name, value in self.dataset.told(indices, generator).items() if name in takes(self.network)}
        share = getattr(objective, "label_dropout", getattr(objective, "condition_dropout", None))
        if told and share is not None:
            told = dropped(told, self.network, torch.rand(b, generator=generator, dtype=torch.float32) < share)
        told = {**{name: own(value) for name, value in told.items()}, **objective.draw_conditions(draws)}
        return {**batch, **{CONDITION + name: value for name, value in told.items()}, **objective.draw_more(draws)}

    def _ordered(self, x: Tensor) -> Tensor:
        return x.to(memory_format=self.memory_format) if x.ndim == 4 else x


def split(batch: Batch, parts: int) -> Iterator[Batch]:
    """The batch in parts of equal size."""
    for values in zip(*(value.chunk(parts) for value in batch.values()), strict=True):
        yield dict(zip(batch, values, strict=True))
