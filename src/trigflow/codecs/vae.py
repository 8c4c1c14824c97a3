"""The autoencoder between images and latents: diffusers' `AutoencoderKL` or another of its kind, loaded when first used.

Bytes are given to it in the range that the latents are of, and come back from it in the same::

    pixels = byte / 255             unit range, [0, 1], as EDM2
    pixels = byte / 127.5 - 1       symmetric range, [-1, 1], as the autoencoder was trained

All arithmetic is in float32, without its `scaling_factor`.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trigflow.codecs.codec import from_saved
from trigflow.runtime.errors import MissingExtraError, UserError, first_line
from trigflow.runtime.seeds import generators_kept

DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"
CHANNELS = 4
"""Channels of a latent of SD-VAE."""
PixelRange = Literal["unit", "symmetric"]


@dataclass(frozen=True)
class VAESource:
    """Which autoencoder latents belong to.

    Attributes:
        name: an id of the Hugging Face hub or the path of a folder, as diffusers writes it.
        pixels: range of the pixels given to it and got from it: `unit` [0, 1] or `symmetric` [-1, 1]. SD-VAE was trained on
            [-1, 1]; EDM2 nevertheless uses [0, 1], and its statistics and published networks hold for that alone.
        digest: of its weights (`VAE.digest`), so that another one is noticed; None where it is not known.
        subfolder: where it lies in the folder of a pipeline.
        channels: of a latent; None for the 4 of SD-VAE.
    """

    name: str = DEFAULT_VAE
    pixels: PixelRange = "unit"
    digest: str | None = None
    subfolder: str | None = None
    channels: int | None = None

    @property
    def depth(self) -> int:
        """Channels of a latent."""
        return self.channels or CHANNELS

    def state(self) -> dict[str, object]:
        """A plain dict for JSON; `from_state` gives back an equal object."""
        return {name: value for name, value in vars(self).items() if value is not None or name == "digest"}

    @classmethod
    def from_state(cls, state: object) -> VAESource:
        """The inverse of `state`. Raises a UserError if it is no such dict."""
        return from_saved(cls, "an autoencoder", state)

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


class VAE:
    """An autoencoder whose weights are read when they are first needed, and then kept.

    Args:
        source: which one, and the range of its pixels.
        batch_size: images it takes at once.
        network: the `AutoencoderKL` itself, where it is at hand; it is taken as it is, and nothing is read.
    """

    def __init__(self, source: VAESource, batch_size: int = 8, network: Any = None) -> None:
        self.source = source
        self.batch_size = batch_size
        self._network = network

    def load(self, device: torch.device | str | None = None) -> Any:
        """The diffusers `AutoencoderKL` in float32, moved to this device (None: left where it is).

        Raises:
            MissingExtraError: without diffusers.
            UserError: if it cannot be read, is no autoencoder of RGB images with 4 latent channels, or has not the weights
                that the latents were made with.
        """
        if self._network is None:
            network = _read(self.source)
            if self.source.digest is not None and digest_of(network) != self.source.digest:
                raise UserError(
                    f"the VAE '{self.source.name}' is not the one that these latents were made with; expected weights of "
                    f"digest {self.source.digest}; restore the VAE, or encode the images again with this one"
                )
            self._network = network
        if device is not None:
            self._network.to(device)
        return self._network

    @property
    def factor(self) -> int:
        """Pixels a latent is wide and high; the autoencoder is loaded."""
        return factor_of(self.load().config)

    def digest(self) -> str:
        """A fingerprint of the weights, the same whatever the parameters are called; the autoencoder is loaded."""
        return digest_of(self.load())

    def check_images(self, images: Tensor) -> None:
        """Raise a UserError unless `encode` can take images of this shape; the autoencoder is loaded."""
        factor = self.factor
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
            raise UserError(
                f"images of shape {tuple(images.shape)}; expected (b, 3, h, w), height and width multiples of {factor}; "
                f"use --resize N with a multiple of {factor}"
            )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Mean and standard deviation of the latents of images, computed where the images are.

        Args:
            images: uint8 `(b, 3, h, w)`, height and width multiples of `factor`.

        Returns:
            float32 `(b, 2 c, h / factor, w / factor)`: c channels of means, c of standard deviations; of an autoencoder that
            gives no deviations they are 0.

        Raises:
            UserError: as `load`, and for images of another shape.
        """
        self.check_images(images)
        network = self.load(images.device)
        parts = []
        for part in images.split(self.batch_size):
            pixels = part.float() / 255 if self.source.pixels == "unit" else part.float() / 127.5 - 1
            pixels = pixels.to(network.dtype)
            found = network.encode(pixels[:, :, None] if of_video(network.config) else pixels)
            posterior = getattr(found, "latent_dist", None)
            moments = (found.latent, 0 * found.latent) if posterior is None else (posterior.mean, posterior.std)
            moment = torch.cat(moments, dim=1).float()
            parts.append(moment[:, :, 0] if of_video(network.config) else F.pixel_unshuffle(moment, patch_of(network.config)))
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents, computed where the latents are.

        Args:
            latents: floating `(b, c, h, w)` or, of a video, `(b, c, frames, h, w)`, as the encoder gives them.

        Returns:
            uint8 `(b, 3, factor h, factor w)`, rounded to the nearest and clamped; the frames of a video side by side.

        Raises:
            UserError: as `load`, and for latents of another shape.
        """
        if latents.ndim == 3:
            raise UserError(
                f"latents of shape {tuple(latents.shape)}, of a sound; expected those of pictures, as sounds cannot be decoded "
                "yet; take the latents, codec.stored(x0), to their own autoencoder"
            )
        if latents.ndim not in (4, 5) or latents.shape[1] != self.source.depth:
            raise UserError(
                f"latents of shape {tuple(latents.shape)}; expected (b, {self.source.depth}, h, w); give latents, not images"
            )
        network = self.load(latents.device)
        parts = []
        for part in latents.to(network.dtype).split(self.batch_size):
            video, patch = of_video(network.config), patch_of(network.config)
            part = F.pixel_shuffle(part, patch) if patch > 1 else part
            time = [part.new_zeros(len(part))] if network.config.get("timestep_conditioning") else []  # without noise
            pixels = network.decode(part[:, :, None] if video and part.ndim == 4 else part, *time).sample
            pixels = pixels.movedim(2, 3).flatten(3) if pixels.ndim == 5 else pixels
            values = pixels * 255 if self.source.pixels == "unit" else (pixels + 1) * 127.5
            parts.append(values.round().clamp(0, 255).to(torch.uint8))
        return torch.cat(parts)


def factor_of(config: Mapping[str, Any]) -> int:
    """Pixels a latent of an autoencoder with this configuration is wide and high."""
    said = config.get("spatial_compression_ratio") or config.get("scale_factor_spatial")
    if "downsampling_ratios" in config:  # of a sound
        return math.prod(config["downsampling_ratios"])
    if not said and "spatio_temporal_scaling" in config:
        return config["patch_size"] * 2 ** sum(config["spatio_temporal_scaling"])
    levels = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    return said or patch_of(config) * 2 ** (len(levels) - 1 if levels else len(config["temperal_downsample"]))


def channels_of(config: Mapping[str, Any]) -> int:
    """Channels of a latent of an autoencoder with this configuration."""
    known = ("latent_channels", "z_dim", "decoder_input_channels")
    return patch_of(config) ** 2 * config[next((name for name in known if name in config), known[0])]


def patch_of(config: Mapping[str, Any]) -> int:
    """Places that go into one of a latent, in each direction: those of Flux 2 are normalized, and used, as patches."""
    return config["patch_size"][0] if "batch_norm_eps" in config else 1


def of_video(config: Mapping[str, Any]) -> bool:
    """Whether latents of an autoencoder with this configuration have an axis for time."""
    return any(name in config for name in ("temporal_compression_ratio", "temperal_downsample", "spatio_temporal_scaling"))


def scaling_of(config: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel of latents that diffusers' pipelines take off: `(z - mean) / std` is what the denoiser
    is told."""
    channels, factor = channels_of(config), config.get("scaling_factor") or 1.0
    mean = config.get("latents_mean") or [config.get("shift_factor") or 0.0] * channels
    std = [value / factor for value in config.get("latents_std") or [1.0] * channels]
    return tuple(map(float, mean)), tuple(map(float, std))


def digest_of(network: Any) -> str:
    """Fingerprint of the weights of a network: of the sorted fingerprints of its tensors, names aside."""
    tensors = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in network.state_dict().values())
    parts = sorted(hashlib.blake2b(tensor.numpy().tobytes(), digest_size=16).digest() for tensor in tensors)
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def _read(source: VAESource) -> Any:
    """The autoencoder of this folder or hub id, in float32 and eval mode, on the CPU. Only safetensors files are read."""
    name = source.name
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError("an autoencoder of images", "diffusers", "latents") from error
    path = os.path.expanduser(name)
    place = path if os.path.isdir(path) else name
    try:
        with generators_kept():  # fresh weights, about to be replaced, draw from the default generator
            kind: Any = diffusers.AutoencoderKL
            if source.subfolder is not None:  # in the folder of a pipeline, which may have one of another class
                kind = getattr(diffusers, str(kind.load_config(place, subfolder=source.subfolder)["_class_name"]))
            if not issubclass(kind, torch.nn.Module):  # a pipeline would bring parts of its own along
                raise TypeError(f"a {kind.__name__} is no autoencoder")
            network, report = kind.from_pretrained(
                place,
                subfolder=source.subfolder,
                trust_remote_code=False,
                torch_dtype=torch.float32,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except MemoryError:
        raise
    except Exception as error:  # diffusers and the hub raise all kinds
        raise UserError(
            f"the VAE '{name}' cannot be loaded ({first_line(error)}); expected a folder that diffusers wrote, with "
            "safetensors, or an id of the Hugging Face hub; check the name, or the connection"
        ) from None
    absent = [*report["missing_keys"], *report["unexpected_keys"]]
    if absent:
        raise UserError(
            f"the VAE '{name}' has not the weights of an AutoencoderKL (first difference '{absent[0]}'); expected a folder "
            "that diffusers wrote of one; check the name"
        )
    config = network.config
    found = (config.get("in_channels", 3), channels_of(config), config.get("out_channels", 3))
    if found != (3, source.depth, 3):
        raise UserError(
            f"the VAE '{name}' turns {found[0]} channels into latents of {found[1]} and back into {found[2]}; expected 3, "
            f"{source.depth} and 3; use one like stabilityai/sd-vae-ft-mse"
        )
    return network.eval().requires_grad_(False)
