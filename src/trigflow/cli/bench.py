"""`trigflow bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Bench:
    """Measure how fast a run's model draws in each variant of its network, and pick one.

    Example: trigflow bench runs/demo --batches 1 16 256
    """

    run_folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder of a student or a teacher."""
    steps: int | None = None
    """Evaluations of a student (default 2; of one with segments their number, and no other), or solver steps of a teacher."""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """Batch sizes."""
    seconds: float = 1.0
    """Seconds of drawing for each variant and batch size; at least 5 draws are made."""
    variants: tuple[str, ...] = ()
    """plain, traced, graph, graph-bf16, compiled, onnx, bf16, fp16, int8; all by default but compiled, which takes minutes to
    build."""
    tolerance: int = 2
    """Levels of 255 by which a pixel may differ from plain float32 in the variant that is picked."""
    threads: int | None = None
    """Threads on the CPU; PyTorch's choice by default."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    json: Path | None = None
    """Also write the numbers to this file."""

    def run(self) -> None:
        import torch

        from trigflow.deploy.measure import describe, measure
        from trigflow.models.model import load
        from trigflow.runtime.errors import UserError
        from trigflow.runtime.files import write_json
        from trigflow.runtime.places import check_place

        if self.threads is not None:
            if self.threads < 1:
                raise UserError(f"{self.threads} threads; expected at least 1; correct --threads")
            torch.set_num_threads(self.threads)
        if self.json is not None:
            check_place(self.json, "file", "--json")
        report = measure(
            load(self.run_folder, self.device),
            steps=self.steps,
            batches=self.batches,
            seconds=self.seconds,
            variants=self.variants,
            tolerance=self.tolerance,
        )
        print(describe(report))
        if self.json is not None:
            write_json(self.json, report.as_dict())
