"""Bytes of images to the `x0` of the process, and back.

The process takes data of standard deviation `sd` (sigma_data). Pixels are brought there by one mean a channel and one scale
for all of them, so that the relative contrast of the channels is kept::

    x0 = (byte / 127.5 - 1 - mean_c) * scale
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trigflow.codecs.codec import from_saved, register
from trigflow.codecs.pictures import DrawnPictures
from trigflow.runtime.errors import UserError

CHUNK_ELEMENTS = 1 << 22
"""Pixels counted at a time by `count_values`."""


@register
@dataclass(frozen=True)
class Pixels(DrawnPictures):
    """`x0 = (byte / 127.5 - 1 - mean_c) * scale`.

    Attributes:
        shape: `(c, h, w)` of one image.
        mean: one number a channel, in units of pixels in [-1, 1].
        scale: one positive number for all channels.
        sigma_data: standard deviation that `x0` is meant to have; 0.5 in every preset of the paper.

    Raises:
        UserError: if a number is not finite, `scale` or `sigma_data` is not positive, or the means are not one a channel.
    """

    kind: ClassVar[str] = "pixels"
    pictured: ClassVar[bool] = True
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    scale: float
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        numbers = (*self.mean, self.scale, self.sigma_data)
        fine = bool(self.mean) and all(map(math.isfinite, numbers)) and self.scale > 0 and self.sigma_data > 0
        if not fine or len(self.shape) != 3 or len(self.mean) != self.shape[0]:
            raise UserError(
                f"pixels of shape {self.shape}, mean={self.mean}, scale={self.scale}, sigma_data={self.sigma_data}; expected "
                "(c, h, w) and finite numbers, one mean a channel, scale and sigma_data above 0; measure the data again"
            )

    @classmethod
    def symmetric(cls, shape: tuple[int, ...], sigma_data: float = 0.5) -> Pixels:
        """Mean 0 and scale 1: pixels in [-1, 1], taken to have `sd = 0.5`, as in the paper's pixel-space presets."""
        return cls(shape, (0.0,) * shape[0], 1.0, sigma_data)

    @classmethod
    def measured(cls, shape: tuple[int, ...], counts: Tensor, sigma_data: float = 0.5, name: str = "the data") -> Pixels:
        """The codec under which data have zero mean a channel and standard deviation `sigma_data` overall.

        With pixels `p` in [-1, 1]::

            mean_c = E[p | channel c],      scale = sigma_data / sqrt(E[(p - mean_c)^2])

        where both expectations run over all images and places, and the second over the channels too, in float64.

        Args:
            shape: `(c, h, w)` of one image.
            counts: how often each byte occurs in each channel, int64 `(c, 256)`; see `count_values`.
            sigma_data: standard deviation of x0.
            name: of the data, for messages.

        Raises:
            UserError: if there are no images, if all of them are of one constant colour, or `sigma_data` is not positive.
        """
        if not bool(counts.sum()):
            raise UserError(f"{name!r} holds no images; expected at least one; point to other data")
        levels = torch.arange(256, dtype=torch.float64)
        counts = counts.double()
        per_channel = counts.sum(dim=1)
        mean = (counts @ levels) / per_channel
        variance = float((counts * (levels - mean[:, None]) ** 2).sum() / per_channel.sum())
        if variance == 0:
            raise UserError(
                f"every image of {name!r} is the same single colour; expected pixels that vary; point to other data"
            )
        return cls(
            shape,
            mean=tuple(float(m) / 127.5 - 1 for m in mean),
            scale=sigma_data * 127.5 / math.sqrt(variance),
            sigma_data=sigma_data,
        )

    @property
    def drawn_shape(self) -> tuple[int, ...]:
        """`(c, h, w)` of one image."""
        return self.shape

    def encode(self, stored: Tensor) -> Tensor:
        """Bytes, uint8 `(b, c, h, w)`, to `x0`, float32 of the same shape and device. Raises a UserError if they are not uint8
        of shape `(b, c, h, w)` with as many channels as there are means."""
        if stored.dtype != torch.uint8:
            raise UserError(f"images of type {stored.dtype}; expected uint8, 0 to 255; encode bytes, not floats")
        return (stored.float() / 127.5 - 1 - self._mean_like(stored)) * self.scale

    def stored(self, x0: Tensor) -> Tensor:
        """`x0`, floating `(b, c, h, w)`, to bytes: the inverse of `encode`, rounded to the nearest and clamped to 0..255.
        Raises a UserError if `x0` is not of shape `(b, c, h, w)` with as many channels as there are means."""
        pixels = (x0.float() / self.scale + self._mean_like(x0) + 1) * 127.5
        return pixels.round().clamp(0, 255).to(torch.uint8)

    def decode(self, x0: Tensor) -> Tensor:
        """The same: bytes are what a person gets."""
        return self.stored(x0)

    def normalized(self, mean: list[float], std: list[float]) -> list[tuple[str, float, float]]:
        """Of all channels together, of pixels in [-1, 1]; nothing where the codec was not measured."""
        if len(mean) != len(self.mean) or self == Pixels.symmetric(self.shape, self.sigma_data):
            return []
        furthest = max((m - center for m, center in zip(mean, self.mean, strict=True)), key=abs)
        spread = math.sqrt(sum(s**2 for s in std) / len(std))
        return [("", furthest * self.scale, spread * self.scale)]

    def describe(self) -> dict[str, Any]:
        """The shape."""
        return {"image shape (c, h, w)": list(self.shape)}

    def state(self) -> dict[str, Any]:
        """A plain dict for JSON; `from_state` gives back an equal object."""
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "mean": list(self.mean),
            "scale": self.scale,
            "sigma_data": self.sigma_data,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Pixels:
        """The inverse of `state`. Raises a UserError if a key is missing or a value is not a number."""
        return from_saved(cls, "pixels", state)

    def _mean_like(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != len(self.mean):
            raise UserError(
                f"images of shape {tuple(images.shape)}; expected (b, {len(self.mean)}, h, w); "
                "use the codec measured on these data"
            )
        return torch.tensor(self.mean, dtype=torch.float32, device=images.device)[:, None, None]


def count_values(images: Tensor) -> Tensor:
    """How often each byte occurs in each channel of uint8 images `(n, c, h, w)`: int64, shape `(c, 256)`."""
    n, channels, height, width = images.shape
    chunk = max(1, CHUNK_ELEMENTS // (channels * height * width))
    counts = torch.zeros(channels, 256, dtype=torch.int64)
    for start in range(0, n, chunk):
        for channel in range(channels):
            values = images[start : start + chunk, channel].flatten()
            counts[channel] += torch.bincount(values, minlength=256).cpu()
    return counts


def count_all(chunks: Iterable[Tensor], channels: int) -> Tensor:
    """`count_values` of images that come in chunks, so that no copy of all of them is made."""
    return sum((count_values(images) for images in chunks), torch.zeros(channels, 256, dtype=torch.int64))
