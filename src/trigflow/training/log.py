"""Metrics of a run: JSON lines, and event files of TensorBoard where it is installed.

`torch.utils.tensorboard.SummaryWriter` leaves writing to a thread, which ends with a traceback when the disk is full and takes
the run with it. Here a record is written when it is made, or not at all.

Source of the format: https://www.tensorflow.org/tutorials/load_data/tfrecord, a record being an `Event`.
"""

import contextlib
import io
import itertools
import json
import math
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from trigflow.runtime.distributed import gather_figures, is_first
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import ensure_folder, write_text


class Appended:
    """A file to which records are appended, each of them whole or not at all.

    Attributes:
        path: the file; it need not exist.
        trouble: why the latest record could not be written; empty where it was.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trouble = ""
        self._file: io.FileIO | None = None

    def append(self, record: bytes) -> bool:
        """Write a record at the end; returns whether it is the first one in a row that could not be written."""
        before, self.trouble = self.trouble, ""
        try:
            if self._file is None:
                self._file = io.FileIO(self.path, "a")
            self._write(self._file, record)
        except OSError as error:
            self.trouble = error.strerror or str(error)
        return bool(self.trouble) and not before

    def close(self) -> None:
        """Close the file; the next record opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @staticmethod
    def _write(file: io.FileIO, record: bytes) -> None:
        end = file.seek(0, io.SEEK_END)
        try:
            left = memoryview(record)
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(end)
            raise


class Board:
    """Writes scalars and pictures into a new event file.

    Args:
        folder: where event files are; created.
        purge: what an earlier file has of this and later iterations is not shown; 0 for nothing.

    Raises:
        ImportError: where TensorBoard is not installed.
    """

    def __init__(self, folder: Path, purge: int = 0) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self._event, self._writer, self._summary = Event, RecordWriter, summary
        name = f"events.out.tfevents.{int(time.time()):010d}.{platform.node()}.{os.getpid()}"
        self.file = Appended(next(p for i in itertools.count() if not (p := folder / f"{name}.{i}").exists()))
        events = [Event(file_version="brain.Event:2")]
        if purge:
            events.append(Event(step=purge, session_log=SessionLog(status=SessionLog.START)))
        try:
            ensure_folder(folder)
        except UserError as error:
            self.file.trouble = str(error)
        self._append(events)

    def scalars(self, values: dict[str, float], iteration: int) -> bool:
        """Write numbers by name; returns whether that fails for the first time in a row."""
        return self._append(
            [self._event(step=iteration, summary=self._summary.scalar(name, value)) for name, value in values.items()]
        )

    def picture(self, name: str, pixels: Any, iteration: int) -> bool:
        """Write a picture `(h, w, c)` uint8; returns whether that fails for the first time in a row."""
        return self._append([self._event(step=iteration, summary=self._summary.image(name, pixels, dataformats="HWC"))])

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _append(self, events: list[Any]) -> bool:
        records = io.BytesIO()
        writer = self._writer(records)
        for event in events:
            event.wall_time = time.time()
            writer.write(event.SerializeToString())
        return self.file.append(records.getvalue())


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
            write_text(self.path, "".join(f"{json.dumps(m)}\n" for m in read_metrics(folder) if m["iteration"] <= start))
        self.file = Appended(self.path)
        self.board: Board | None = None
        with contextlib.suppress(ImportError):  # the JSON lines are complete without it
            self.board = Board(folder / "tensorboard", start + 1)

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
    lines = path.read_bytes().splitlines() if path.is_file() else []
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
            result[f"{name}_by_time"] = [(s / n).item() if n else None for s, n in zip(total, count, strict=True)]
        return result


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [_plain(v) for v in value] if isinstance(value, list) else value
