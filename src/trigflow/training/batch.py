"""Batches: images become x0, and everything random in a step is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trigflow.codecs import Codec
from trigflow.data import Dataset
from trigflow.training.config import RunConfig
from trigflow.training.parallel import Share

Batch = dict[str, Tensor]
"""`x0` and `noise` `(b, *shape)`; `t` and, where there are any, `label` and `guidance` `(b,)`. For MeanFlow also the `end`
`(b,)` of each jump. For VSD also the noise `z` that is generated from, and noise and times for noising again: `vsd_noise`,
`vsd_t` and `fake_noise`, `fake_t`."""


@dataclass(frozen=True)
class Batches:
    """Draws batches; the same indices and generator give the same batch.

    With several processes each has its share of it. All random numbers of the batch are drawn in every process, so that a
    sample has the same ones whatever the number of processes; images are read for the share alone.

    Attributes:
        config: data, objective and process settings.
        dataset: what is stored.
        codec: stored data to x0.
        null_label: label that means "no class", of the network; None where it takes no labels.
        takes_guidance: whether the network takes a guidance scale.
        device: where batches go; random numbers are drawn on the CPU.
        memory_format: order of the images in memory.
        share: which samples of a batch this process has; None for all.
    """

    config: RunConfig
    dataset: Dataset
    codec: Codec
    null_label: int | None
    takes_guidance: bool
    device: torch.device
    memory_format: torch.memory_format
    share: Share | None = None

    def draw(self, indices: Tensor, generator: torch.Generator, stored: Tensor | None = None) -> Batch:
        """The batch of these samples; flips, noise, times, dropped labels and guidance scales from the generator.

        Args:
            indices: which samples the whole batch has, int64, shape `(b,)`.
            generator: draws everything random.
            stored: what the data set stores of the samples of this process, where that has been read.
        """
        objective, process = self.config.objective, self.config.process
        b, rows = len(indices), None if self.share is None else self.share.rows()

        def own(values: Tensor) -> Tensor:
            return values if rows is None else values[rows]

        flip = torch.rand(b, generator=generator) < 0.5 if self.config.data.flip else None
        values, label = self.dataset.batch(indices, flip=flip, generator=generator, rows=rows, stored=stored)
        x0 = self.codec.encode(values.to(self.device))
        x0 = x0.to(memory_format=self.memory_format) if x0.ndim == 4 else x0

        def noise() -> Tensor:
            like = x0 if rows is None else torch.empty(b, *x0.shape[1:], dtype=x0.dtype)
            z = own(process.sample_noise(like, generator)).to(self.device)
            return z.to(memory_format=self.memory_format) if z.ndim == 4 else z

        batch = {"x0": x0, "noise": noise()}
        if objective.averages:
            batch["t"], batch["end"] = (own(times).to(self.device) for times in objective.meanflow.draw(b, generator))
        else:
            batch["t"] = own(objective.proposal.sample(process, b, generator)).to(self.device)
        if label is not None and self.null_label is not None:
            if objective.kind == "diffusion":
                dropped = torch.rand(b, generator=generator) < objective.label_dropout
                label = torch.where(own(dropped), self.null_label, label)
            batch["label"] = label.to(self.device)
        if self.takes_guidance:
            guidance = 1 + (objective.guidance_max - 1) * torch.rand(b, generator=generator)
            batch["guidance"] = own(guidance).to(self.device)
        if objective.uses_vsd:
            for name in ("z", "vsd_noise", "fake_noise"):
                batch[name] = noise()
            for name in ("vsd_t", "fake_t"):
                batch[name] = own(objective.vsd_proposal.sample(process, b, generator)).to(self.device)
        return batch


def split(batch: Batch, parts: int) -> Iterator[Batch]:
    """The batch in parts of equal size."""
    for values in zip(*(value.chunk(parts) for value in batch.values()), strict=True):
        yield dict(zip(batch, values, strict=True))
