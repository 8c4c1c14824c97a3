"""From bytes to the `x0` of the process, and back.

The process takes data of standard deviation `sd` (sigma_data). Pixels are brought there by one mean a channel and one scale
for all of them, so that the relative contrast of the channels is kept::

    x0 = (byte / 127.5 - 1 - mean_c) * scale
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trigflow.data.dataset import ImageDataset
from trigflow.runtime.errors import UserError

CHUNK_ELEMENTS = 1 << 22
"""Pixels counted at a time by `measure`."""


@dataclass(frozen=True)
class Normalization:
    """`x0 = (byte / 127.5 - 1 - mean_c) * scale`.

    Attributes:
        mean: one number a channel, in units of pixels in [-1, 1].
        scale: one positive number for all channels.
        sigma_data: standard deviation that `x0` is meant to have; 0.5 in every preset of the paper.

    Raises:
        UserError: if a number is not finite, `scale` or `sigma_data` is not positive, or there is no channel.
    """

    mean: tuple[float, ...]
    scale: float
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        numbers = (*self.mean, self.scale, self.sigma_data)
        if not self.mean or not all(map(math.isfinite, numbers)) or self.scale <= 0 or self.sigma_data <= 0:
            raise UserError(
                f"normalization mean={self.mean}, scale={self.scale}, sigma_data={self.sigma_data}; expected finite "
                "numbers, one mean a channel, scale and sigma_data above 0; measure the data again"
            )

    @classmethod
    def symmetric(cls, channels: int) -> Normalization:
        """Mean 0 and scale 1: pixels in [-1, 1], taken to have `sd = 0.5`, as in the paper's pixel-space presets."""
        return cls(mean=(0.0,) * channels, scale=1.0)

    def encode(self, images: Tensor) -> Tensor:
        """Bytes, uint8 `(b, c, h, w)`, to `x0`, float32 of the same shape and device.

        Raises:
            UserError: if `images` is not uint8 of shape `(b, c, h, w)` with as many channels as there are means.
        """
        if images.dtype != torch.uint8:
            raise UserError(f"images of type {images.dtype}; expected uint8, 0 to 255; encode bytes, not floats")
        return (images.float() / 127.5 - 1 - self._mean_like(images)) * self.scale

    def decode(self, x0: Tensor) -> Tensor:
        """`x0`, floating `(b, c, h, w)`, to bytes: the inverse of `encode`, rounded to the nearest and clamped to 0..255.

        Raises:
            UserError: if `x0` is not of shape `(b, c, h, w)` with as many channels as there are means.
        """
        pixels = (x0.float() / self.scale + self._mean_like(x0) + 1) * 127.5
        return pixels.round().clamp(0, 255).to(torch.uint8)

    def state(self) -> dict[str, object]:
        """A plain dict for JSON; `from_state` gives back an equal object."""
        return {"mean": list(self.mean), "scale": self.scale, "sigma_data": self.sigma_data}

    @classmethod
    def from_state(cls, state: Mapping[str, object]) -> Normalization:
        """The inverse of `state`.

        Raises:
            UserError: if a key is missing or a value is not a number.
        """
        mean, scale, sigma_data = (state.get(key) for key in ("mean", "scale", "sigma_data"))
        if not isinstance(mean, list | tuple):
            mean = [None]
        numbers = [float(v) for v in (*mean, scale, sigma_data) if isinstance(v, int | float)]
        if len(numbers) != len(mean) + 2:
            raise UserError(
                f"a normalization saved as {dict(state)!r}; expected the numbers mean (a list), scale and sigma_data; "
                "take the file from a finished run, unedited"
            )
        return cls(mean=tuple(numbers[:-2]), scale=numbers[-2], sigma_data=numbers[-1])

    def _mean_like(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != len(self.mean):
            raise UserError(
                f"images of shape {tuple(images.shape)}; expected (b, {len(self.mean)}, h, w); "
                "use the normalization measured on these data"
            )
        return torch.tensor(self.mean, dtype=torch.float32, device=images.device)[:, None, None]


def measure(dataset: ImageDataset, sigma_data: float = 0.5) -> Normalization:
    """The normalization under which the data set has zero mean a channel and standard deviation `sigma_data` overall.

    With pixels `p` in [-1, 1]::

        mean_c = E[p | channel c],      scale = sigma_data / sqrt(E[(p - mean_c)^2])

    where both expectations run over all images and places, and the second over the channels too. They are taken in float64
    from exact counts of the 256 values in each channel, gathered a chunk at a time, so that no float copy of the images is
    ever made.

    Raises:
        UserError: if there are no images, if all of them are of one constant colour, or `sigma_data` is not positive.
    """
    if len(dataset) == 0:
        raise UserError(f"{dataset.name!r} holds no images; expected at least one; point to other data")
    levels = torch.arange(256, dtype=torch.float64)
    counts = _counts_of(dataset).double()
    per_channel = counts.sum(dim=1)
    mean = (counts @ levels) / per_channel
    variance = float((counts * (levels - mean[:, None]) ** 2).sum() / per_channel.sum())
    if variance == 0:
        raise UserError(
            f"every image of {dataset.name!r} is the same single colour; expected pixels that vary; point to other data"
        )
    return Normalization(
        mean=tuple(float(m) / 127.5 - 1 for m in mean),
        scale=sigma_data * 127.5 / math.sqrt(variance),
        sigma_data=sigma_data,
    )


def _counts_of(dataset: ImageDataset) -> Tensor:
    if dataset.counts is not None:
        return dataset.counts
    if dataset.rows is None:
        return count_values(dataset.images)
    return torch.stack([count_values(images) for images in dataset.chunks()]).sum(dim=0)


def count_values(images: Tensor) -> Tensor:
    """How often each byte occurs in each channel: int64, shape `(c, 256)`."""
    n, channels, height, width = images.shape
    chunk = max(1, CHUNK_ELEMENTS // (channels * height * width))
    counts = torch.zeros(channels, 256, dtype=torch.int64)
    for start in range(0, n, chunk):
        for channel in range(channels):
            values = images[start : start + chunk, channel].flatten()
            counts[channel] += torch.bincount(values, minlength=256).cpu()
    return counts
