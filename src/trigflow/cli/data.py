"""Commands on data: `data` and `encode`."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from trigflow.runtime.machine import resolve_device


@dataclass(frozen=True)
class Data:
    """Read a whole data set and say what is wrong with it, one line each.

    Exit code 0 when nothing was found, 1 when something was, 2 when it cannot be read at all.

    Example: trigflow data check photos/ --resize 64
    """

    action: Annotated[Positional[Literal["check"]], arg(metavar="check")]
    """What to do: check."""
    path: Annotated[Positional[str], arg(metavar="PATH")]
    """Folder, zip, tar, folder of tars, or hf:NAME, of images or latents."""
    resize: int | None = None
    """Images may be of any size, as in training with --resize N."""
    like: Annotated[Path | None, arg(metavar="RUN")] = None
    """Also compare size, classes, mean and deviation with the data that this run was trained on."""
    limit: int = 20
    """Lines of one kind; 0 for all."""
    workers: int = 0
    """Processes that read and decode."""
    json: bool = False
    """Print JSON instead of text."""
    quiet: bool = False
    """No progress bar."""

    def run(self) -> None:
        from trigflow.data.check import check_data

        progress = not self.quiet and sys.stderr.isatty()
        report = check_data(self.path, resize=self.resize, like=self.like, workers=self.workers, progress=progress)
        print(json.dumps(report.facts(), indent=2) if self.json else report.text(self.limit))
        if report.problems:
            sys.exit(1)


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
    teacher: Annotated[Path | None, arg(name="with", metavar="RUN")] = None
    """Run folder of a teacher imported from diffusers: use its autoencoder, size and text encoders, and write a folder that
    holds latents and what the encoders make of the captions."""
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
    captions: bool = True
    """Take the captions of the images along."""
    quiet: bool = False
    """No progress bar."""

    def run(self) -> None:
        from trigflow.data.cached import encode_for
        from trigflow.data.encode import encode_images

        how: dict[str, Any] = {name: getattr(self, name) for name in ("batch_size", "workers", "captions")}
        how |= {"device": resolve_device(self.device), "progress": not self.quiet}
        if self.teacher is not None:
            count = encode_for(self.teacher, self.data, self.out, **how)
            then = f"distill with: trigflow distill {self.teacher} --data {self.out} --lora 64 --out RUN"
        else:
            count = encode_images(self.data, self.out, vae=self.vae, pixels=self.pixels, resize=self.resize, **how)
            then = f"train on them with: trigflow train --data {self.out} --out RUN"
        print(f"{count} latents in {self.out}; {then}")
