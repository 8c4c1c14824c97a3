"""`trigflow reference`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


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
    """inception, dinov2, digits, mnist or pixels; auto takes inception, but for digits and mnist their own."""
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
        from trigflow.runtime.errors import UserError
        from trigflow.runtime.machine import resolve_device
        from trigflow.runtime.places import check_place

        if self.out.suffix.lower() != ".npz":
            raise UserError(f"'{self.out}' is no .npz; expected a file of that ending; rename --out")
        check_place(self.out, "file")
        found = measure_reference(
            self.data,
            features=self.features,
            weights=self.weights,
            keep=self.keep,
            num=self.num,
            resize=self.resize,
            batch_size=self.batch_size,
            device=resolve_device(self.device),
            progress=not self.quiet,
        )
        if Processes.present().rank == 0:
            write_reference(self.out, found)
        kept = 0 if found.features is None else len(found.features)
        print(f"Statistics of {found.statistics.n} images in {self.out}: {found.extractor}, {kept} features kept")
        print(f"Measure against them with: trigflow evaluate RUN --reference {self.out}")
