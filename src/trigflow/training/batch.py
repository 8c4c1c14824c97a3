"""Batches: images become x0, and everything random in a step is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trigflow.data import ImageDataset, LatentNormalization, Normalization
from trigflow.training.config import RunConfig

Batch = dict[str, Tensor]
"""`x0` and `noise` `(b, c, h, w)`; `t` and, where there are any, `label` and `guidance` `(b,)`. For MeanFlow also the `end`
`(b,)` of each jump. For VSD also the noise `z` that is generated from, and noise and times for noising again: `vsd_noise`,
`vsd_t` and `fake_noise`, `fake_t`."""


@dataclass(frozen=True)
class Batches:
    """Draws batches; the same indices and generator give the same batch.

    Attributes:
        config: data, objective and process settings.
        dataset: the images or latents.
        normalization: bytes or latents to x0.
        null_label: label that means "no class", of the network; None where it takes no labels.
        takes_guidance: whether the network takes a guidance scale.
        device: where batches go; random numbers are drawn on the CPU.
        memory_format: order of the images in memory.
    """

    config: RunConfig
    dataset: ImageDataset
    normalization: Normalization | LatentNormalization
    null_label: int | None
    takes_guidance: bool
    device: torch.device
    memory_format: torch.memory_format

    def draw(self, indices: Tensor, generator: torch.Generator) -> Batch:
        """The batch of these samples; flips, noise, times, dropped labels and guidance scales from the generator."""
        objective, process = self.config.objective, self.config.process
        b = len(indices)
        flip = torch.rand(b, generator=generator) < 0.5 if self.config.data.flip else None
        images, label = self.dataset.batch(indices, flip=flip, generator=generator)
        x0 = self.normalization.encode(images.to(self.device)).to(memory_format=self.memory_format)
        noise = process.sample_noise(x0, generator).to(memory_format=self.memory_format)
        batch = {"x0": x0, "noise": noise}
        if objective.averages:
            batch["t"], batch["end"] = (times.to(self.device) for times in objective.meanflow.draw(b, generator))
        else:
            batch["t"] = objective.proposal.sample(process, b, generator).to(self.device)
        if label is not None and self.null_label is not None:
            if objective.kind == "diffusion":
                dropped = torch.rand(b, generator=generator) < objective.label_dropout
                label = torch.where(dropped, self.null_label, label)
            batch["label"] = label.to(self.device)
        if self.takes_guidance:
            guidance = 1 + (objective.guidance_max - 1) * torch.rand(b, generator=generator)
            batch["guidance"] = guidance.to(self.device)
        if objective.uses_vsd:
            for name in ("z", "vsd_noise", "fake_noise"):
                batch[name] = process.sample_noise(x0, generator).to(memory_format=self.memory_format)
            for name in ("vsd_t", "fake_t"):
                batch[name] = objective.vsd_proposal.sample(process, b, generator).to(self.device)
        return batch


def split(batch: Batch, parts: int) -> Iterator[Batch]:
    """The batch in parts of equal size."""
    for values in zip(*(value.chunk(parts) for value in batch.values()), strict=True):
        yield dict(zip(batch, values, strict=True))
