"""Latents of an autoencoder to the `x0` of the process, and back to images.

    x0 = (z - raw_mean_c) / raw_std_c * sigma_data      one mean and one deviation a channel

These are latents as the autoencoder's encoder gives them; its `scaling_factor` is not applied. A network made elsewhere, such
as an EDM2 network of shape (4, 64, 64), takes part with `Latents.edm2((4, 64, 64))`, and with `vae="path/of/sd-vae-ft-mse"`
where the autoencoder lies in a folder. Nothing here needs diffusers until pixels are wanted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from trigflow.codecs.codec import from_saved, register
from trigflow.codecs.pictures import DrawnPictures
from trigflow.codecs.vae import DEFAULT_VAE, VAE, VAESource
from trigflow.runtime.errors import UserError

EDM2_RAW_MEAN = (5.81, 3.25, 0.12, -2.15)
EDM2_RAW_STD = (4.17, 4.62, 3.71, 3.28)
"""Mean and deviation a channel of the latents of ImageNet at 512x512, pixels in [0, 1] (EDM2, `StabilityVAEEncoder`)."""


@register
@dataclass(frozen=True)
class Latents(DrawnPictures):
    """`x0 = (z - raw_mean_c) / raw_std_c * sigma_data` for latents `z` as the autoencoder gives them.

    Attributes:
        shape: `(c, h, w)` of one latent, `(c, frames, h, w)` of a video, `(c, length)` of a sound.
        raw_mean: mean of each channel.
        raw_std: standard deviation of each channel.
        sigma_data: standard deviation that `x0` is meant to have; 0.5 in every preset of the paper.
        vae: the autoencoder that decodes the latents.
        autoencoder: the autoencoder itself, read when it is first needed.

    Raises:
        UserError: if a number is not finite, a deviation or `sigma_data` is not positive, or the channels do not agree.
    """

    kind: ClassVar[str] = "latents"
    pictured: ClassVar[bool] = False
    shape: tuple[int, ...]
    raw_mean: tuple[float, ...] = EDM2_RAW_MEAN
    raw_std: tuple[float, ...] = EDM2_RAW_STD
    sigma_data: float = 0.5
    vae: VAESource = field(default_factory=VAESource)
    autoencoder: VAE = field(default=None, compare=False, repr=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        finite = all(map(math.isfinite, (*self.raw_mean, *self.raw_std, self.sigma_data)))
        positive = all(value > 0 for value in (*self.raw_std, self.sigma_data))
        channels = {len(self.raw_mean), len(self.raw_std), *self.shape[:1]}
        if len(self.shape) not in (2, 3, 4) or len(channels) != 1 or not finite or not positive:
            raise UserError(
                f"latents of shape {self.shape}, raw_mean={self.raw_mean}, raw_std={self.raw_std}, "
                f"sigma_data={self.sigma_data}; expected (c, h, w), (c, frames, h, w) or (c, length), a finite mean and a "
                "positive deviation a channel; measure the data again"
            )
        if self.autoencoder is None or self.autoencoder.source != self.vae:
            object.__setattr__(self, "autoencoder", VAE(self.vae))

    @classmethod
    def edm2(cls, shape: tuple[int, ...], vae: str = DEFAULT_VAE, sigma_data: float = 0.5) -> Latents:
        """EDM2's numbers, for latents of SD-VAE of pixels in [0, 1]; `vae` is an id of the hub or a folder."""
        return cls(shape, sigma_data=sigma_data, vae=VAESource(vae, "unit"))

    @property
    def drawn_shape(self) -> tuple[int, ...]:
        """`(3, factor h, factor w)` of one image; the autoencoder is loaded."""
        h, w = self.shape[-2:]
        return 3, h * self.autoencoder.factor, w * self.autoencoder.factor

    def with_autoencoder(self, name: str) -> Latents:
        """The same with the autoencoder of this name, an id of the Hugging Face hub or a folder."""
        return replace(self, vae=replace(self.vae, name=name), autoencoder=VAE(replace(self.vae, name=name)))

    def encode(self, stored: Tensor) -> Tensor:
        """Latents `z`, floating `(b, c, h, w)`, to `x0`, float32 of the same shape and device. Raises a UserError if they are
        not floating of shape `(b, c, h, w)` with as many channels as there are means."""
        mean, std = self._like(stored)
        return (stored.float() - mean) / std * self.sigma_data

    def stored(self, x0: Tensor) -> Tensor:
        """`x0` to latents `z`, float32: the inverse of `encode`, up to rounding; errors as `encode`."""
        mean, std = self._like(x0)
        return x0.float() / self.sigma_data * std + mean

    def decode(self, x0: Tensor) -> Tensor:
        """What the autoencoder makes of `x0`, uint8 `(b, 3, factor h, factor w)`; errors as `VAE.load`."""
        return self.autoencoder.decode(self.stored(x0))

    def seen(self, pictures: Tensor) -> Tensor:
        """Of uint8 `(b, 3, factor h, factor w)` the means that the autoencoder gives; errors as `VAE.load`."""
        return self.encode(self.autoencoder.encode(pictures).chunk(2, 1)[0])

    def prepare(self, device: torch.device | str | None = None) -> None:
        """Read the autoencoder, and move it to this device; errors as `VAE.load`."""
        self.autoencoder.load(device)

    def component(self) -> Any:
        """The `AutoencoderKL`, loaded."""
        return self.autoencoder.load()

    def with_component(self, module: Any) -> Latents:
        """The same with this `AutoencoderKL`."""
        return self if module is None else replace(self, autoencoder=VAE(self.vae, network=module))

    def normalized(self, mean: list[float], std: list[float]) -> list[tuple[str, float, float]]:
        """Of each channel by itself."""
        known = enumerate(zip(mean, std, self.raw_mean, self.raw_std, strict=False))
        sd = self.sigma_data
        return [(f"channel {c}", (m - center) * (sd / spread), s * (sd / spread)) for c, (m, s, center, spread) in known]

    def describe(self) -> dict[str, Any]:
        """Shape and autoencoder."""
        return {"latent shape (c, h, w)": list(self.shape), "autoencoder": self.vae.name}

    def state(self) -> dict[str, Any]:
        """A plain dict for JSON; `from_state` gives back an equal object."""
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "raw_mean": list(self.raw_mean),
            "raw_std": list(self.raw_std),
            "sigma_data": self.sigma_data,
            "vae": self.vae.state(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Latents:
        """The inverse of `state`. Raises a UserError if a key is missing or a value is not what it should be."""
        return from_saved(cls, "latents", state)

    def _like(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        if latents.ndim not in (3, 4, 5) or latents.shape[1] != len(self.raw_mean) or not latents.is_floating_point():
            raise UserError(
                f"latents of type {latents.dtype} and shape {tuple(latents.shape)}; expected floats of shape "
                f"(b, {len(self.raw_mean)}, h, w); use the codec of these latents"
            )
        mean, std = (torch.tensor(v, dtype=torch.float32, device=latents.device) for v in (self.raw_mean, self.raw_std))
        ones = [1] * (latents.ndim - 2)
        return mean.view(-1, *ones), std.view(-1, *ones)
