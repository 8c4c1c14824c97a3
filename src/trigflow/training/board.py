"""Event files of TensorBoard, written without a thread of their own.

`torch.utils.tensorboard.SummaryWriter` leaves writing to a thread, which ends with a traceback when the disk is full and takes
the run with it. Here a record is written when it is made, or not at all.

Source of the format: https://www.tensorflow.org/tutorials/load_data/tfrecord, a record being an `Event`.
"""

from __future__ import annotations

import io
import itertools
import os
import platform
import time
from pathlib import Path
from typing import Any

from trigflow.runtime.errors import UserError
from trigflow.runtime.files import ensure_folder


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
