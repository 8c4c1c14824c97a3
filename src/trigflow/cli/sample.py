"""`trigflow sample`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from trigflow.runtime.errors import UserError


@dataclass(frozen=True)
class Sample:
    """Draw images from a run folder: a grid, or single files.

    Example: trigflow sample runs/demo --steps 2 --labels 3 7 --num 64 --out grid.png
    """

    run_folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder of a teacher or a student."""
    out: Annotated[str, arg(metavar="PATH")] = "samples.png"
    """A file (.png, .webp, .jpg) for a grid; anything else, or with / at its end, is a folder that gets one PNG per image."""
    steps: int | None = None
    """Evaluations of a student (default 2; of one with segments their number, and no other), or solver steps of a teacher
    (default 18, that is 35 evaluations)."""
    guidance: float = 1.0
    """Guidance scale; 1 for none."""
    guidance_interval: tuple[float, float] | None = None
    """Guide a teacher only at noise levels sigma between these two."""
    negative: Annotated[Path | None, arg(metavar="RUN")] = None
    """Run folder of a worse teacher (smaller, or trained for less time) to guide away from; by default the model without
    the class."""
    labels: tuple[str, ...] = ()
    """Classes to draw, by number or name, in turn; all of them by default."""
    conditions: Annotated[tuple[str, ...], arg(metavar="NAME=VALUE")] = ()
    """What else is said to the model, such as wind=0.5,-1; numbers are parted by commas."""
    gamma: float | None = None
    """Of a student of any jump: how much fresh noise comes between steps, from 0 to 1."""
    seed: int = 0
    """Seed; the same seed starts every model from the same noise."""
    num: int = 64
    """Number of images."""
    columns: int | None = None
    """Images per row of a grid."""
    solver: str = "heun"
    """Solver of a teacher: heun, dpm2s, dpm++2m or ddim."""
    vae: str | None = None
    """Autoencoder of a model of latents, where it is not to be found under the name it had: a folder, or an id of the hub."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    quiet: bool = False
    """No progress bar."""

    def run(self) -> None:
        from trigflow.codecs import codec_from_state
        from trigflow.models.model import check_run, load, read_description, source_of
        from trigflow.runtime.distributed import gather_rows, is_first, share_of, world_size
        from trigflow.runtime.places import check_outside

        codec_from_state(read_description(check_run(self.run_folder) / "model.json")["codec"]).check_save(
            self.out, self.num
        )
        check_outside(self.out, source_of(self.run_folder))
        negative = None if self.negative is None else load(self.negative, self.device)
        model = load(self.run_folder, self.device)
        if self.vae is not None:
            model.codec = model.codec.with_autoencoder(self.vae)
        first, num = 0, self.num
        if world_size() > 1:
            share = share_of(self.num)
            if self.num < world_size():
                raise UserError(
                    f"{self.num} images on {world_size()} processes; expected at least one each; raise --num or start fewer"
                )
            first, num = share.start, len(share)
        drawn = model.sample(
            num,
            first=first,
            steps=self.steps,
            labels=list(self.labels) or None,
            conditions=_said(self.conditions),
            gamma=self.gamma,
            guidance=self.guidance,
            guidance_interval=self.guidance_interval,
            negative=negative,
            seed=self.seed,
            solver=self.solver,
            progress=not self.quiet and is_first(),
        )
        images = gather_rows(drawn)
        if images is None:
            return
        print(model.codec.save(images, self.out, self.columns))


def _said(given: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` as a value by name: a list of numbers where it is one, otherwise the text."""
    said: dict[str, Any] = {}
    for one in given:
        name, sign, value = one.partition("=")
        if not (name and sign) or name in said:
            raise UserError(f"--conditions {one}; expected NAME=VALUE, such as wind=0.5,-1, each name once; correct it")
        try:
            numbers = [float(number) for number in value.split(",")]
            said[name] = numbers if len(numbers) > 1 else numbers[0]
        except ValueError:
            said[name] = value
    return said
