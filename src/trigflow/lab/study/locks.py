"""Locks between processes, which the system releases when a process ends, however it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout


def lock_of(out: Path, model: str) -> Path:
    """The lock of a run folder below `out`: who holds it may train or draw from that model."""
    return out / "locks" / model.replace("/", "-")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of this file, which is created where it is missing; waits until it is free."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path).acquire(poll_interval=0.1):  # looks again and again, so that Ctrl-C is noticed
        yield


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock."""
    if not path.is_file():
        return False
    try:
        with FileLock(path).acquire(timeout=0):
            return False
    except Timeout:
        return True
