"""Latents of an autoencoder in place of images: the data set, its files, and the way to the `x0` of the process.

The autoencoder (SD-VAE) gives for every image the mean and the standard deviation of a Gaussian over latents. Both are
stored, 4 + 4 channels, and training draws one latent from them each time the image comes up (EDM2, Karras et al., CVPR 2024)::

    z  = mean + std * eps,                              eps ~ N(0, I)
    x0 = (z - raw_mean_c) / raw_std_c * sigma_data      one mean and one deviation a channel

These are latents as the autoencoder's encoder gives them; its `scaling_factor` is not applied. A file of 4 channels holds
means alone and is taken as it is.

The run folder of a latent model says in `model.json` how its latents are scaled and which autoencoder decodes them. A model
made elsewhere, such as an EDM2 network of shape (4, 64, 64), takes part with::

    Model(network, config, "diffusion", (4, 64, 64), class_names, LatentNormalization.edm2())

and `LatentNormalization.edm2(vae="path/of/sd-vae-ft-mse")` where the autoencoder lies in a folder. Nothing here needs
diffusers; `trigflow.codecs.vae` does, when pixels are wanted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from trigflow.data.dataset import ImageDataset
from trigflow.data.sources.files import OpenArchives
from trigflow.data.statistics import Normalization, measure
from trigflow.runtime.errors import UserError

DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"
CHANNELS = 4
"""Channels of a latent of SD-VAE."""
EDM2_RAW_MEAN = (5.81, 3.25, 0.12, -2.15)
EDM2_RAW_STD = (4.17, 4.62, 3.71, 3.28)
"""Mean and deviation a channel of the latents of ImageNet at 512x512, pixels in [0, 1] (EDM2, `StabilityVAEEncoder`)."""

PixelRange = Literal["unit", "symmetric"]
RANGES = ("unit", "symmetric")


@dataclass(frozen=True)
class VAESource:
    """Which autoencoder latents belong to.

    Attributes:
        name: an id of the Hugging Face hub or the path of a folder, as diffusers writes it.
        pixels: range of the pixels given to it and got from it: `unit` [0, 1] or `symmetric` [-1, 1]. SD-VAE was trained on
            [-1, 1]; EDM2 nevertheless uses [0, 1], and its statistics and published networks hold for that alone.
        digest: of its weights (`trigflow.codecs.vae.VAE.digest`), so that another one is noticed; None where it is not known.
    """

    name: str = DEFAULT_VAE
    pixels: PixelRange = "unit"
    digest: str | None = None

    def state(self) -> dict[str, object]:
        """A plain dict for JSON; `from_state` gives back an equal object."""
        return {"name": self.name, "pixels": self.pixels, "digest": self.digest}

    @classmethod
    def from_state(cls, state: object) -> VAESource:
        """The inverse of `state`.

        Raises:
            UserError: if it is no such dict.
        """
        found = state if isinstance(state, Mapping) else {}
        name, pixels, digest = (found.get(key) for key in ("name", "pixels", "digest"))
        if not isinstance(name, str) or pixels not in RANGES or not isinstance(digest, str | None):
            raise UserError(
                f"an autoencoder given as {state!r}; expected its name, pixels (unit or symmetric) and digest; "
                "take the file as trigflow wrote it"
            )
        return cls(name, cast(PixelRange, pixels), digest)

    def check_same(self, other: VAESource, mine: str, theirs: str) -> None:
        """Raise a UserError if latents of `other` are not latents of this one, as far as the two are known."""
        if self.pixels != other.pixels:
            raise UserError(
                f"{mine} are latents of {self.pixels} pixels and {theirs} of {other.pixels} pixels; expected the same; "
                f"encode the images again with --pixels {other.pixels}"
            )
        if self.digest and other.digest and self.digest != other.digest:
            raise UserError(
                f"{mine} are latents of the VAE '{self.name}' and {theirs} of another, '{other.name}'; expected the same; "
                f"encode the images again with --vae {other.name}"
            )


@dataclass(frozen=True)
class LatentNormalization:
    """`x0 = (z - raw_mean_c) / raw_std_c * sigma_data` for latents `z` as the autoencoder gives them.

    Attributes:
        raw_mean: mean of each channel.
        raw_std: standard deviation of each channel.
        sigma_data: standard deviation that `x0` is meant to have; 0.5 in every preset of the paper.
        vae: the autoencoder that decodes the latents.

    Raises:
        UserError: if a number is not finite, a deviation or `sigma_data` is not positive, or the channels do not agree.
    """

    raw_mean: tuple[float, ...] = EDM2_RAW_MEAN
    raw_std: tuple[float, ...] = EDM2_RAW_STD
    sigma_data: float = 0.5
    vae: VAESource = field(default_factory=VAESource)

    def __post_init__(self) -> None:
        finite = all(map(math.isfinite, (*self.raw_mean, *self.raw_std, self.sigma_data)))
        positive = all(value > 0 for value in (*self.raw_std, self.sigma_data))
        if not self.raw_mean or len(self.raw_mean) != len(self.raw_std) or not finite or not positive:
            raise UserError(
                f"a latent normalization raw_mean={self.raw_mean}, raw_std={self.raw_std}, sigma_data={self.sigma_data}; "
                "expected a finite mean and a positive deviation a channel; measure the data again"
            )

    @classmethod
    def edm2(cls, vae: str = DEFAULT_VAE, sigma_data: float = 0.5) -> LatentNormalization:
        """EDM2's numbers, for latents of SD-VAE of pixels in [0, 1]; `vae` is an id of the hub or a folder."""
        return cls(sigma_data=sigma_data, vae=VAESource(vae, "unit"))

    def encode(self, latents: Tensor) -> Tensor:
        """Latents `z`, floating `(b, c, h, w)`, to `x0`, float32 of the same shape and device.

        Raises:
            UserError: if they are not floating of shape `(b, c, h, w)` with as many channels as there are means.
        """
        mean, std = self._like(latents)
        return (latents.float() - mean) / std * self.sigma_data

    def decode(self, x0: Tensor) -> Tensor:
        """`x0` to latents `z`, float32: the inverse of `encode`, up to rounding.

        Raises:
            UserError: as `encode`.
        """
        mean, std = self._like(x0)
        return x0.float() / self.sigma_data * std + mean

    def state(self) -> dict[str, object]:
        """A plain dict for JSON; `from_state` gives back an equal object."""
        return {
            "kind": "latent",
            "raw_mean": list(self.raw_mean),
            "raw_std": list(self.raw_std),
            "sigma_data": self.sigma_data,
            "vae": self.vae.state(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, object]) -> LatentNormalization:
        """The inverse of `state`.

        Raises:
            UserError: if a key is missing or a value is not a number.
        """
        mean, std, sigma_data = (state.get(key) for key in ("raw_mean", "raw_std", "sigma_data"))
        if not _are_numbers(mean) or not _are_numbers(std) or not _are_numbers([sigma_data]):
            raise UserError(
                f"a latent normalization saved as {dict(state)!r}; expected the numbers raw_mean and raw_std (lists) and "
                "sigma_data; take the file from a finished run, unedited"
            )
        vae = VAESource.from_state(state.get("vae"))
        return cls(tuple(cast(list[float], mean)), tuple(cast(list[float], std)), cast(float, sigma_data), vae)

    def _like(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        if latents.ndim != 4 or latents.shape[1] != len(self.raw_mean) or not latents.is_floating_point():
            raise UserError(
                f"latents of type {latents.dtype} and shape {tuple(latents.shape)}; expected floats of shape "
                f"(b, {len(self.raw_mean)}, h, w); use the normalization of these latents"
            )
        mean, std = (torch.tensor(v, dtype=torch.float32, device=latents.device) for v in (self.raw_mean, self.raw_std))
        return mean[:, None, None], std[:, None, None]


def _are_numbers(values: object) -> bool:
    """Whether this is a list of plain numbers (True is none)."""
    return isinstance(values, list | tuple) and all(type(value) in (int, float) for value in values)


@dataclass(frozen=True, eq=False)
class LatentRows:
    """Latents that stay in an uncompressed zip and are read as they are asked for.

    Attributes:
        path: the zip.
        offsets: where the numbers of each latent begin in it, int64, shape `(n,)`.
        shape: `(c, h, w)` of one.
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
        """The latents at these indices `(b,)`, float32 `(b, c, h, w)`.

        Raises:
            UserError: if one of them is not finite.
        """
        dtype = np.dtype(self.dtype)
        size = math.prod(self.shape) * dtype.itemsize
        rows = torch.empty(len(indices), *self.shape)
        for row, offset in zip(rows, self.offsets[indices].tolist(), strict=True):
            data = self.archives.read(self.path, offset, size)
            if len(data) != size:
                raise UserError(f"{self.path!r} ends too early; expected the zip as it was; restore it and start again")
            row.copy_(torch.from_numpy(np.frombuffer(data, dtype).astype(np.float32).reshape(self.shape)))
        if not bool(rows.isfinite().all()):
            raise UserError(
                f"{self.path!r} holds latents that are not finite; expected numbers; encode the images again"
            )
        return rows

    def only(self, indices: Tensor) -> LatentRows:
        """These latents alone."""
        return replace(self, offsets=self.offsets[indices])


@dataclass(frozen=True, eq=False)
class LatentDataset(ImageDataset):
    """Latents of equal-sized images, in memory or in their file.

    Attributes:
        images: float32, shape `(n, 8, h, w)`: 4 channels of means and 4 of standard deviations; or `(n, 4, h, w)`, means
            alone. With `rows`, of the same shape with n = 0.
        vae: the autoencoder that they are of.

    The other attributes, and what is raised, are those of `ImageDataset`.
    """

    vae: VAESource = field(default_factory=VAESource)

    def _check_images(self) -> None:
        images = self.images
        if images.dtype != torch.float32 or images.ndim != 4 or images.shape[1] not in (CHANNELS, 2 * CHANNELS):
            raise UserError(
                f"latents of type {images.dtype} and shape {tuple(images.shape)}; expected float32 of shape "
                f"(n, {CHANNELS} or {2 * CHANNELS}, h, w); encode the images with: trigflow encode"
            )

    @property
    def channels(self) -> int:
        """Channels of one latent, 4, whether deviations are stored beside the means or not."""
        return CHANNELS

    @property
    def has_std(self) -> bool:
        """Whether standard deviations are stored beside the means."""
        return self.images.shape[1] == 2 * CHANNELS

    def batch(
        self,
        indices: Tensor,
        *,
        flip: Tensor | None = None,
        generator: torch.Generator | None = None,
        rows: Tensor | None = None,
        stored: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Latents `z = mean + std * eps`, float32 `(b, 4, h, w)`, and their labels, int64 `(b,)` or None.

        Args:
            indices: which images, int64, shape `(b,)`; one may come up several times.
            flip: has to be None.
            generator: `eps` is drawn from it, on the CPU; None gives the means.
            rows: which of the indices are wanted, int64; None for all. Whatever they are, `eps` is drawn for all indices.
            stored: what `stored` gave for the wanted indices, where that was asked for before.

        Raises:
            UserError: if `flip` is given: the latent of a mirrored image is not the mirrored latent.
        """
        if flip is not None:
            raise UserError(NO_FLIP)
        count, indices = len(indices), indices if rows is None else indices[rows]
        stored = self.stored(indices) if stored is None else stored
        mean, std = stored[:, :CHANNELS], stored[:, CHANNELS:]
        if generator is not None and self.has_std:
            eps = torch.randn(count, *mean.shape[1:], generator=generator)
            mean = mean + std * (eps if rows is None else eps[rows]).to(mean.device)
        return mean, self._labels_of(indices)


NO_FLIP = (
    "mirrored latents; expected none, as the latent of a mirrored image is not the mirrored latent; "
    "turn data.flip off, or encode mirrored copies of the images"
)


def measure_latents(dataset: LatentDataset, sigma_data: float = 0.5) -> LatentNormalization:
    """The normalization under which every channel has zero mean and standard deviation `sigma_data`.

    With stored means `m` and deviations `s`, over all images and places of a channel::

        raw_mean = E[m],      raw_std^2 = E[m^2] - raw_mean^2 + E[s^2]

    summed in float64, 64 images at a time.

    Raises:
        UserError: if there are no latents, or a channel is constant.
    """
    if len(dataset) == 0:
        raise UserError(f"{dataset.name!r} holds no latents; expected at least one; point to other data")
    places = len(dataset) * dataset.height * dataset.width
    total, squares = torch.zeros(CHANNELS, dtype=torch.float64), torch.zeros(CHANNELS, dtype=torch.float64)
    for stored in dataset.chunks():
        values = stored.double()
        total += values[:, :CHANNELS].sum(dim=(0, 2, 3)).cpu()
        squares += values.square().unflatten(1, (-1, CHANNELS)).sum(dim=(0, 1, 3, 4)).cpu()
    mean = total / places
    variance = squares / places - mean.square()
    constant = variance <= 1e-12 * mean.square()
    if bool(constant.any()):
        raise UserError(
            f"channel {int(constant.int().argmax())} of the latents in {dataset.name!r} is constant; expected latents that "
            "vary; point to other data"
        )
    return LatentNormalization(tuple(mean.tolist()), tuple(variance.sqrt().tolist()), sigma_data, dataset.vae)


def normalization_for(
    dataset: ImageDataset, kind: Literal["measured", "symmetric", "edm2"], sigma_data: float
) -> Normalization | LatentNormalization:
    """The normalization of this kind (`DataConfig.normalize`) for these images or latents.

    Raises:
        UserError: if the kind is not one for such data.
    """
    if not isinstance(dataset, LatentDataset):
        if kind == "edm2":
            raise UserError(
                f"data.normalize is edm2 and {dataset.name!r} holds images; expected latents; set it to measured or "
                "symmetric, or encode the images with: trigflow encode"
            )
        return Normalization.symmetric(dataset.channels) if kind == "symmetric" else measure(dataset, sigma_data)
    if kind == "measured":
        return measure_latents(dataset, sigma_data)
    if kind == "symmetric" or dataset.vae.pixels != "unit":
        raise UserError(
            f"data.normalize is {kind} for latents of {dataset.vae.pixels} pixels; expected measured, or edm2 for latents "
            "of unit pixels, of which EDM2's statistics are; set data.normalize to measured"
        )
    return LatentNormalization(sigma_data=sigma_data, vae=dataset.vae)


def normalization_from_state(state: Mapping[str, object]) -> Normalization | LatentNormalization:
    """The normalization of images or of latents that `state()` was taken of.

    Raises:
        UserError: if it is none.
    """
    return (LatentNormalization if state.get("kind") == "latent" else Normalization).from_state(state)
