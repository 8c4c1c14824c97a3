"""`trigflow encode`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional


@dataclass(frozen=True)
class Encode:
    """Turn images into latents of an autoencoder (SD-VAE), to train on in their place.

    Writes a zip that `trigflow train --data` takes. Interrupted, the same command goes on where it stopped.

    Example: trigflow encode photos/ --resize 512 --out latents.zip
    """

    data: Positional[str]
    """Folder or zip of images."""
    out: Path
    """Zip of latents to write."""
    vae: str = "stabilityai/sd-vae-ft-mse"
    """The autoencoder: an id of the Hugging Face hub, or a folder that diffusers wrote."""
    resize: int | None = None
    """Scale and crop every image to N x N."""
    pixels: Literal["unit", "symmetric"] = "unit"
    """Range of the pixels given to the autoencoder: [0, 1], as EDM2 and its published networks, or [-1, 1]."""
    batch_size: int = 8
    """Images at once."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    workers: int = 0
    """Processes that read and decode images, ahead of the autoencoder."""
    quiet: bool = False
    """No progress bar."""

    def run(self) -> None:
        from trigflow.data.encode import encode_images
        from trigflow.runtime.machine import resolve_device

        count = encode_images(
            self.data,
            self.out,
            vae=self.vae,
            pixels=self.pixels,
            resize=self.resize,
            batch_size=self.batch_size,
            device=resolve_device(self.device),
            workers=self.workers,
            progress=not self.quiet,
        )
        print(f"{count} latents in {self.out}; train on them with: trigflow train --data {self.out} --out RUN")
