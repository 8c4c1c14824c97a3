"""Latents of an autoencoder in place of images: the data set and its rows.

The autoencoder (SD-VAE) gives for every image the mean and the standard deviation of a Gaussian over latents. Both are
stored, c + c channels, and training draws one latent from them each time the image comes up (EDM2, Karras et al., CVPR 2024)::

    z = mean + std * eps,      eps ~ N(0, I)

A file of c channels (4 of SD-VAE) holds means alone and is taken as it is. How latents become x0 is the matter of
`trigflow.codecs.latents`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trigflow.codecs import Latents
from trigflow.codecs.vae import VAESource
from trigflow.data.dataset import Dataset
from trigflow.data.sources.files import OpenArchives
from trigflow.runtime.errors import UserError


@dataclass(frozen=True, eq=False)
class LatentRows:
    """Latents that stay in an uncompressed zip and are read as they are asked for.

    Attributes:
        path: the zip.
        offsets: where the numbers of each latent begin in it, int64, shape `(n,)`.
        shape: `(c, h, w)` of one, of a video `(c, frames, h, w)`.
        dtype: of the numbers, as numpy writes it.
    """

    path: str
    offsets: Tensor
    shape: tuple[int, ...]
    dtype: str
    archives: OpenArchives = field(default_factory=OpenArchives)
    shards = None
    window = 1

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """The latents at these indices `(b,)`, float32 `(b, c, h, w)`. Raises a UserError if one of them is not finite."""
        dtype = np.dtype(self.dtype)
        size = math.prod(self.shape) * dtype.itemsize
        rows = torch.empty(len(indices), *self.shape, dtype=torch.float32)
        for row, offset in zip(rows, self.offsets[indices].tolist(), strict=True):
            data = self.archives.read(self.path, offset, size)
            if len(data) != size:
                raise UserError(f"{self.path!r} ends too early; expected the zip as it was; restore it and start again")
            row.copy_(torch.from_numpy(np.frombuffer(data, dtype).astype(np.float32).reshape(self.shape)))
        if not bool(rows.isfinite().all()):
            raise UserError(f"{self.path!r} holds latents that are not finite; expected numbers; encode the images again")
        return rows

    def only(self, indices: Tensor) -> LatentRows:
        """These latents alone."""
        return replace(self, offsets=self.offsets[indices])


@dataclass(frozen=True, eq=False)
class LatentDataset(Dataset):
    """Latents of equal-sized images, in memory or in their file.

    Attributes:
        values: float32, shape `(n, 2 c, h, w)`: c channels of means and c of standard deviations; or `(n, c, h, w)`, means
            alone. Those of videos have frames before h. With `rows`, of the same shape with n = 0.
        vae: the autoencoder that they are of.

    The other attributes, and what is raised, are those of `Dataset`.
    """

    vae: VAESource = field(default_factory=VAESource)

    def _check_values(self) -> None:
        values, c = self.values, self.vae.depth
        if values.dtype != torch.float32 or values.ndim not in (4, 5) or values.shape[1] not in (c, 2 * c):
            raise UserError(
                f"latents of type {values.dtype} and shape {tuple(values.shape)}; expected float32 of shape "
                f"(n, {c} or {2 * c}, h, w), or with frames before h; encode the images with: trigflow encode"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """`(c, h, w)` of one latent, whether deviations are stored beside the means or not."""
        return (self.vae.depth, *self.values.shape[2:])

    @property
    def has_std(self) -> bool:
        """Whether standard deviations are stored beside the means."""
        return self.values.shape[1] == 2 * self.vae.depth

    def vary(self, values: Tensor, count: int, rows: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Latents `z = mean + std * eps`, float32 `(b, c, h, w)`, `eps` drawn on the CPU; without a generator the means."""
        mean, std = values[:, : self.vae.depth], values[:, self.vae.depth :]
        if generator is None or not self.has_std:
            return mean
        eps = torch.randn(count, *mean.shape[1:], generator=generator, dtype=torch.float32)
        return mean + std * (eps if rows is None else eps[rows]).to(mean.device)

    def check_flip(self) -> None:
        """Raise a UserError: the latent of a mirrored image is not the mirrored latent."""
        raise UserError(
            "mirrored latents; expected none, as the latent of a mirrored image is not the mirrored latent; "
            "turn data.flip off, or encode mirrored copies of the images"
        )

    def check_codec(self, codec: object, name: str) -> None:
        """Raise a UserError if the codec is that of latents of another autoencoder, as far as the two are known."""
        if isinstance(codec, Latents):
            self.vae.check_same(codec.vae, "the data", f"those of the {name}")

    def codec(self, normalize: Literal["measured", "symmetric", "edm2"], sigma_data: float) -> Latents:
        """Measured or EDM2's numbers; see `Dataset.codec` and `measure_latents`."""
        if normalize == "measured":
            return measure_latents(self, sigma_data)
        if normalize == "symmetric" or self.vae.pixels != "unit":
            raise UserError(
                f"data.normalize is {normalize} for latents of {self.vae.pixels} pixels; expected measured, or edm2 for "
                "latents of unit pixels, of which EDM2's statistics are; set data.normalize to measured"
            )
        return Latents(self.shape, sigma_data=sigma_data, vae=self.vae)


def measure_latents(dataset: LatentDataset, sigma_data: float = 0.5) -> Latents:
    """The codec under which every channel has zero mean and standard deviation `sigma_data`.

    With stored means `m` and deviations `s`, over all images and places of a channel::

        raw_mean = E[m],      raw_std^2 = E[m^2] - raw_mean^2 + E[s^2]

    summed in float64, 64 images at a time.

    Raises:
        UserError: if there are no latents, or a channel is constant.
    """
    if len(dataset) == 0:
        raise UserError(f"{dataset.name!r} holds no latents; expected at least one; point to other data")
    places = len(dataset) * math.prod(dataset.shape[1:])
    c = dataset.vae.depth
    total, squares = torch.zeros(c, dtype=torch.float64), torch.zeros(c, dtype=torch.float64)
    for stored in dataset.chunks():
        values = stored.double().flatten(2)
        total += values[:, :c].sum(dim=(0, 2)).cpu()
        squares += values.square().unflatten(1, (-1, c)).sum(dim=(0, 1, 3)).cpu()
    mean = total / places
    variance = squares / places - mean.square()
    constant = variance <= 1e-12 * mean.square()
    if bool(constant.any()):
        raise UserError(
            f"channel {int(constant.int().argmax())} of the latents in {dataset.name!r} is constant; expected latents that "
            "vary; point to other data"
        )
    return Latents(dataset.shape, tuple(mean.tolist()), tuple(variance.sqrt().tolist()), sigma_data, dataset.vae)
