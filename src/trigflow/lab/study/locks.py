"""Locks between processes: held by an open file, so that the system releases them when a process ends, however it ends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: one runner at a time is up to the user there
    fcntl = None  # type: ignore[assignment]


def lock_of(out: Path, model: str) -> Path:
    """The lock of a run folder below `out`: who holds it may train or draw from that model."""
    return out / "locks" / model.replace("/", "-")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of this file, which is created where it is missing; waits until it is free."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        while not _try(file):
            time.sleep(0.1)  # a blocking call would not notice Ctrl-C that comes from a thread
        yield


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock."""
    if not path.is_file():
        return False
    with path.open("a") as file:
        return not _try(file)


def _try(file: IO[str]) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
