"""`trigflow export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Export:
    """Write the model of a run folder in the form of another tool.

    diffusers: a TrigFlowPipeline with model card, of a consistency student without segments. torchscript, onnx: the velocity of
    any teacher or student for any batch size, as network.pt or network.onnx with model.json, compared with PyTorch.

    Example: trigflow export runs/demo digits --to onnx
    """

    run_folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder of a teacher or a student."""
    out: Annotated[Positional[Path], arg(metavar="DIR")]
    """Folder to create."""
    to: Literal["diffusers", "torchscript", "onnx"]
    """Form of the result."""

    def run(self) -> None:
        from trigflow.deploy.export import export_run

        print(export_run(self.run_folder, self.out, self.to))
