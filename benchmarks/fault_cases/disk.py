"""Disks that are full."""

from __future__ import annotations

import contextlib
import errno
import functools
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fault_cases.runs import (
    ITERATIONS,
    Bench,
    Command,
    Trial,
    being_written,
    checkpoints,
    expect,
    last_lines,
    leftovers,
    one_line,
    stopped,
    wait_until,
)

MEGABYTES = 16
REPEATS = 3


class SmallDisk:
    """A small file system of its own. Where none may be mounted, a folder, and a limit to the size of files stands for its end.

    Args:
        folder: where it is mounted.
        megabytes: its size.

    Attributes:
        real: whether it could be mounted.
    """

    def __init__(self, folder: Path, megabytes: float = MEGABYTES) -> None:
        self.folder = folder
        self.filler = folder / "filler"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1024)}k", "tmpfs", str(folder)]
        with contextlib.suppress(FileNotFoundError):
            self.real = subprocess.run(command, capture_output=True, check=False).returncode == 0

    def __enter__(self) -> SmallDisk:
        return self

    def __exit__(self, *error: object) -> None:
        if self.real:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    def fill(self, command: Command) -> None:
        """Leave no byte free."""
        if not self.real:
            resource.prlimit(command.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
            return
        block = bytes(4096)
        try:
            with self.filler.open("wb", buffering=0) as file:
                while True:
                    file.write(block)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise

    def free(self, command: Command) -> None:
        """Give back what `fill` took."""
        self.filler.unlink(missing_ok=True)
        if not self.real and command.running():
            resource.prlimit(command.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def shortages(bench: Bench) -> Iterator[Trial]:
    """The disk becomes full at the worst moments, for good or for a while."""
    moments: dict[str, tuple[Callable[[Path], Any], tuple[object, ...]]] = {
        "a checkpoint is written": (lambda run: len(checkpoints(run)) > 1 and being_written(run), ()),
        "a snapshot is written": (  # many, so that one of them is seen on a busy machine too
            lambda run: checkpoints(run) and being_written(run, "ema"),
            ("--ema.snapshot-every", 2),
        ),
        "a sample grid is due": (
            lambda run: any((run / "samples").glob("*.png")),
            ("--loop.checkpoint-every", 0, "--ema.snapshot-every", 1000, "--loop.sample-every", 4),
        ),
        "the model is due": (lambda run: (run / "checkpoints" / f"{ITERATIONS:08d}").exists(), ()),
    }
    for what, (when, more) in moments.items():
        for lasting in (True, False):
            for i in range(REPEATS):
                name = f"full {'from when' if lasting else 'for a while when'} {what} ({i})"
                yield Trial(name, functools.partial(_fill, bench, when, more, lasting))
    for kilobytes in (0, 4, 16, 64):
        yield Trial(f"a disk of {kilobytes} KiB", functools.partial(_too_small, bench, kilobytes))


def _fill(bench: Bench, when: Callable[[Path], Any], more: tuple[object, ...], lasting: bool, folder: Path) -> dict[str, Any]:
    bench.finished()
    with SmallDisk(folder / "disk") as disk:
        out = disk.folder / "run"
        command = bench.start(out, *more, log=folder / "first")
        reached = wait_until(lambda: when(out), command)
        expect(reached, f"ended before: {last_lines(command.said())}")
        with stopped(command):
            disk.fill(command)
        if not lasting:
            wait_until(lambda: "warning" in command.said(), command)
            disk.free(command)
        code = command.wait()
        if code == 0:
            expect("Traceback" not in command.said(), f"a traceback: {last_lines(command.said())}")
        else:
            expect(code == 2, f"exit code {code} instead of 2: {last_lines(command.said())}")
            one_line(command.said())
        expect(not leftovers(out), f"left behind: {', '.join(leftovers(out))}")
        disk.free(command)
        at = len(checkpoints(out))
        if code != 0:
            resumed = bench.start(out, *more, "--resume", "auto", log=folder / "second")
            resumed.ends_well()
        bench.check_same(out, lines=False, snapshots=False)
        return {"went_on": code == 0, "left": code == 2, "checkpoints_kept": at, "tmpfs": disk.real}


def _too_small(bench: Bench, kilobytes: int, folder: Path) -> dict[str, Any]:
    with SmallDisk(folder / "disk", max(kilobytes, 4) / 1024) as disk:
        if not disk.real:
            return {"left_out": 1}
        if kilobytes == 0:
            (disk.folder / "filler").write_bytes(bytes(4096))
        command = bench.start(disk.folder / "run", log=folder / "first")
        said = command.ends_with_one_line()
        expect("space" in said.lower(), f"no word of space: {said}")
        expect(not leftovers(disk.folder), f"left behind: {', '.join(leftovers(disk.folder))}")
    return {"left": 1}
