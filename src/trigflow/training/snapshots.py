"""Snapshots of power-function averages: what post-hoc reconstruction reads.

    RUN/ema/<iteration>-<sigma_rel>.safetensors     one average: parameters, and buffers as of that iteration
    RUN/ema/model.json                              what the run's model.json will say, for runs that have not ended

Every file appears whole or not at all. The header of a snapshot holds the iteration, the number of updates of the average
(iterations less the skipped ones), the length and the number format.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trigflow.runtime.distributed import is_first
from trigflow.runtime.distributed.shards import collect
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import ensure_folder, write_tensors
from trigflow.runtime.wrappers import entries

Format = Literal["fp32", "fp16"]

FP16_RANGE = (2.0**-9, 2.0**15)
"""Largest magnitudes of a tensor that fp16 holds with all its digits; others are kept in full precision."""


@dataclass(frozen=True)
class Snapshot:
    """A power-function average as it was after some iteration; see `list_snapshots`. `updates` are those of the average by
    then, `dtype` the format of the weights in the file."""

    path: Path
    iteration: int
    updates: int
    sigma_rel: float
    dtype: Format


def snapshot_path(run: Path, iteration: int, sigma_rel: float) -> Path:
    """`RUN/ema/<iteration>-<sigma_rel>.safetensors`."""
    return run / "ema" / f"{iteration:08d}-{sigma_rel:g}.safetensors"


def write_snapshot(run: Path, iteration: int, updates: int, sigma_rel: float, network: nn.Module, dtype: Format) -> Path:
    """Write one average, whole or not at all, and return its path. Every process of a run calls this; the first one writes.
    Raises a UserError when it cannot be written."""
    path = snapshot_path(run, iteration, sigma_rel)
    tensors = collect(entries(network))
    if not is_first():
        return path
    ensure_folder(path.parent)
    if dtype == "fp16":
        tensors = {name: _halved(value) for name, value in tensors.items()}
    header = {"iteration": iteration, "updates": updates, "sigma_rel": sigma_rel, "dtype": dtype}
    write_tensors(path, tensors, {"snapshot": json.dumps(header)})
    return path


def list_snapshots(run: Path) -> list[Snapshot]:
    """The snapshots of a run, oldest first. Raises a UserError when one of them is damaged or no snapshot."""
    found = [_read_header(path) for _, path in _files(run)]
    return sorted(found, key=lambda snapshot: (snapshot.iteration, snapshot.sigma_rel))


def drop_snapshots_after(run: Path, iteration: int) -> None:
    """Delete the snapshots of later iterations, which a resumed run makes again."""
    for at, path in _files(run):
        if at > iteration:
            path.unlink()


def _files(run: Path) -> list[tuple[int, Path]]:
    """Iteration and path of every file that has the name of a snapshot."""
    found = [(path.name.split("-")[0], path) for path in (run / "ema").glob("*-*.safetensors")]
    return [(int(at), path) for at, path in found if at.isdecimal()]


def _halved(value: Tensor) -> Tensor:
    if not value.is_floating_point() or value.numel() == 0:
        return value
    largest = value.abs().max().item()
    return value.half() if FP16_RANGE[0] <= largest <= FP16_RANGE[1] else value


def _read_header(path: Path) -> Snapshot:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["snapshot"])
        dtype: Format = "fp16" if header["dtype"] == "fp16" else "fp32"
        return Snapshot(path, int(header["iteration"]), int(header["updates"]), float(header["sigma_rel"]), dtype)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"snapshot '{path}' cannot be read ({type(error).__name__}: {error}); expected a whole file written while "
            "training; delete it to go without"
        ) from None
