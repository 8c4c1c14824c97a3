"""Metrics of a run: JSON lines, and TensorBoard where it is installed."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from trigflow.runtime.distributed import gather_figures, is_first
from trigflow.runtime.files import write_text
from trigflow.training.board import Appended, Board

TIME_BINS = 8
"""Equal bins of t over [0, pi/2] for figures by time."""


def warn(line: str) -> None:
    """Say on stderr what has gone wrong and is not the end of the run; of several processes the first one does."""
    if is_first():
        tqdm.write(f"trigflow: warning: {line}", file=sys.stderr)


class MetricLog:
    """Appends one JSON object per line to `metrics.jsonl` and mirrors scalars and pictures to TensorBoard.

    Args:
        folder: the run folder.
        start: iteration the run (re)starts from; later lines of an interrupted run are dropped.
    """

    def __init__(self, folder: Path, start: int = 0) -> None:
        self.path = folder / "metrics.jsonl"
        if start == 0:
            write_text(self.path, "")
        else:
            write_text(
                self.path, "".join(f"{json.dumps(m)}\n" for m in read_metrics(folder) if m["iteration"] <= start)
            )
        self.file = Appended(self.path)
        self.board: Board | None = None
        with contextlib.suppress(ImportError):  # the JSON lines are complete without it
            self.board = Board(folder / "tensorboard", start)

    def write(self, iteration: int, metrics: dict[str, Any]) -> None:
        """One line: scalars, and lists for figures by time. What is not finite is written as null.

        A line that cannot be written, as on a full disk, is left out: the first of several in a row with a warning.
        """
        line = {"iteration": iteration, **{name: _plain(value) for name, value in metrics.items()}}
        if self.file.append((json.dumps(line, allow_nan=False) + "\n").encode()):
            warn(f"no line in '{self.path}' from iteration {iteration} on, until there is room ({self.file.trouble})")
        if self.board is not None:
            scalars: dict[str, float] = {}
            for name, value in metrics.items():
                values = {f"{name}/{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
                scalars |= {key: v for key, v in values.items() if isinstance(v, int | float)}
            self.board.scalars(scalars, iteration)

    def picture(self, iteration: int, name: str, pixels: Any) -> None:
        """A picture `(h, w, c)` uint8 for TensorBoard."""
        if self.board is not None:
            self.board.picture(name, pixels, iteration)

    def close(self) -> None:
        """Close the files."""
        self.file.close()
        if self.board is not None:
            self.board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; a last line cut short by a crash is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    metrics = []
    for line in lines:
        try:
            metrics.append(json.loads(line))
        except ValueError:
            break
    return metrics


class FigureWindow:
    """Means of per-sample figures since the last flush, overall and by time bin."""

    def __init__(self) -> None:
        self.parts: list[dict[str, Tensor]] = []

    def add(self, figures: dict[str, Tensor]) -> None:
        """Take in figures of shape `(b,)`, `t` among them. Those of another loss bring a time and a prefix of their own:
        `vsd_loss` was measured at `vsd_t`."""
        self.parts.append(figures)

    def gather(self) -> None:
        """Bring the figures of all processes, which all call this, into the first one."""
        if self.parts:
            joined = {name: torch.cat([part[name] for part in self.parts]).cpu() for name in self.parts[0]}
            self.parts = [gather_figures(joined)]

    def flush(self) -> dict[str, Any]:
        """`name` and `name_by_time` (a list of TIME_BINS means, None where no sample fell) for every figure but t."""
        if not self.parts:
            return {}
        joined = {name: torch.cat([part[name] for part in self.parts]).cpu().double() for name in self.parts[0]}
        self.parts = []
        times = {name[:-1]: joined.pop(name) for name in list(joined) if name == "t" or name.endswith("_t")}
        all_bins = {p: (t / (math.pi / 2) * TIME_BINS).long().clamp(0, TIME_BINS - 1) for p, t in times.items()}
        result: dict[str, Any] = {}
        for name, value in joined.items():
            bins = all_bins[max(filter(name.startswith, all_bins), key=len)]  # of the longest prefix
            count = torch.bincount(bins, minlength=TIME_BINS)
            total = torch.bincount(bins, weights=value, minlength=TIME_BINS)
            result[name] = value.mean().item()
            result[f"{name}_by_time"] = [
                (s / n).item() if n else None for s, n in zip(total, count, strict=True)
            ]  # fmt: skip
        return result


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [_plain(v) for v in value] if isinstance(value, list) else value
