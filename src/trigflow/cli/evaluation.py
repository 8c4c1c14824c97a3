"""Commands that measure: `evaluate` and `reference`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from trigflow.cli.models import Drawing
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import write_json
from trigflow.runtime.machine import resolve_device
from trigflow.runtime.places import check_place


@dataclass(frozen=True)
class Evaluate(Drawing):
    """Measure a run: Frechet distance, precision and recall against its data, beside the distance of real from real.

    Example: trigflow evaluate runs/demo --steps 2 --num 2000
    """

    num: int | None = None
    """Samples to draw (default 2000)."""
    seeds: str | None = None
    """Which samples to draw instead, as FIRST-LAST: 0-49999 for the first 50,000, 50000-99999 for the next."""
    repeat: int = 1
    """Draw so many sets of samples, one after another in the numbering, and report the one of lowest distance."""
    features: str = "auto"
    """Feature network: inception (FID), dinov2 (FD-DINOv2), digits, mnist, emoji or pixels; auto chooses by the data."""
    reference: Annotated[Path | None, arg(metavar="FILE")] = None
    """Statistics to compare with, instead of data: .npz of EDM or of trigflow reference, or .pkl of EDM2."""
    weights: str | None = None
    """A local copy of the weights of the features: of inception a file, of dinov2 a folder."""
    data: str | None = None
    """Other data than the run was trained on."""
    find_times: bool = False
    """Of a student: first search the times of its steps, on the samples after those measured, and keep them in the run."""
    clip: str | None = None
    """Folder or id of a CLIP model: also say how well pictures fit their captions."""
    batch_size: int = 256
    """Samples drawn together."""
    out: Path | None = None
    """Also write the figures to this JSON file."""

    def run(self) -> None:
        from trigflow.evaluation import Processes
        from trigflow.evaluation.evaluate_model import evaluate_model, find_times
        from trigflow.migrations import stamped
        from trigflow.models.model import read_description

        first, num = self._range()
        if self.out is not None:
            check_place(self.out, "file")
        model, how = self.model()
        how |= {name: getattr(self, name) for name in ("features", "data", "reference", "weights", "batch_size")}
        how |= {"num": num, "progress": not self.quiet}
        if self.find_times:
            codec = read_description(self.run_folder / "model.json")["codec"]  # --vae is for this once
            times = find_times(model, first=first + self.repeat * num, **how)
            if Processes.present().rank == 0:
                write_json(self.run_folder / "model.json", {**model.description(), "codec": codec})
            print(f"{'times':24} {' '.join(f'{t:.4f}' for t in times)}")
        result = evaluate_model(model, first=first, repeat=self.repeat, clip=self.clip, **how)
        if self.out is not None and Processes.present().rank == 0:
            write_json(self.out, stamped("report", result))
        for name, value in result.items():
            print(f"{name:24} {value:.4f}" if isinstance(value, float) else f"{name:24} {value}")

    def _range(self) -> tuple[int, int]:
        """The first sample, and how many."""
        if self.seeds is None:
            return 0, 2000 if self.num is None else self.num
        found = re.fullmatch(r"(\d{1,15})-(\d{1,15})", self.seeds)
        first, last = (int(found[1]), int(found[2])) if found else (0, -1)
        if self.num is not None or last < first:
            raise UserError(
                f"--seeds {self.seeds}{'' if self.num is None else f' and --num {self.num}'}; expected FIRST-LAST, such as "
                "0-49999, and no --num; correct it"
            )
        return first, last - first + 1


@dataclass(frozen=True)
class Reference:
    """Write the statistics of a data set that `trigflow evaluate --reference` holds generated images against.

    The file is a `.npz` with `mu` and `sigma`, as EDM's.

    Example: trigflow reference photos.zip --features inception --out photos.npz
    """

    data: Positional[str]
    """digits, mnist, or the path of a folder or zip of images."""
    out: Path
    """File to write (.npz)."""
    features: str = "auto"
    """inception, dinov2, digits, mnist, emoji or pixels; auto takes inception, but for data that come along their own."""
    weights: str | None = None
    """A local copy of the weights: of inception a file, of dinov2 a folder."""
    keep: int = 0
    """Keep the features of this many images too; precision and recall need them."""
    num: int | None = None
    """Look at the first images only."""
    resize: int | None = None
    """Scale and crop every image to N x N."""
    batch_size: int = 64
    """Images at once."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    quiet: bool = False
    """No progress bar."""

    def run(self) -> None:
        from trigflow.evaluation import Processes, write_reference
        from trigflow.evaluation.measure_reference import measure_reference

        if self.out.suffix.lower() != ".npz":
            raise UserError(f"'{self.out}' is no .npz; expected a file of that ending; rename --out")
        check_place(self.out, "file")
        found = measure_reference(
            self.data, features=self.features, weights=self.weights, keep=self.keep, num=self.num, resize=self.resize,
            batch_size=self.batch_size, device=resolve_device(self.device), progress=not self.quiet,
        )  # fmt: skip
        if Processes.present().rank == 0:
            write_reference(self.out, found)
        kept = 0 if found.features is None else len(found.features)
        print(f"Statistics of {found.statistics.n} images in {self.out}: {found.extractor}, {kept} features kept")
        print(f"Measure against them with: trigflow evaluate RUN --reference {self.out}")
