"""Folders that take long to fill, for tests that are divided among processes (pytest-xdist)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

import programs

IMPORTED_LATE = ("sklearn.datasets", "tensorboard.summary", "torch._dynamo", "torch.distributed.fsdp")
"""Which a training would import by itself, in every process."""


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` has filled: by the first process of the tests that needs it, while the others wait."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, done = root / name, root / f"{name}.done"
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def run_group(folder: Path, script: str, arguments: list[str], processes: int, port: str, seconds: float) -> list[int]:
    """Run a script beside this file in several processes, in the environment of torchrun, to the end; see `group.py`.

    What they print is added to FOLDER/output. Gives their exit codes.
    """
    group = Path(__file__).with_name("group.py")
    command = [group, processes, port, script, folder, *arguments]
    (folder / "codes").unlink(missing_ok=True)  # of an earlier group
    with (folder / "output").open("a") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = programs.start(
            command, stdout=output, stderr=output, environment=environment, session=True, imports=IMPORTED_LATE
        )
        try:
            process.wait(timeout=seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    codes: list[int] = json.loads((folder / "codes").read_text())
    return codes


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
