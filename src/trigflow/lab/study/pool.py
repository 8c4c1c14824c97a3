"""A few processes at a time: starts cells whose needs are met, and records those that end without a result.

What processes must not do at once they do under a lock, which the system releases when a process ends, however it ends.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trigflow.lab.study.study_plan import Cell
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import ensure_folder, read_json, write_json
from trigflow.training.config import from_dict, to_dict


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


RawResult = dict[str, Any]
"""Content of a result.json: status, reason and figures, see `trigflow.lab.study.cell.run_cell`."""

ATTEMPTS = 2
"""Processes of a cell that may end by a signal, or without saying why, before the cell has failed."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_for(jobs: int) -> int:
    """Threads of each of `jobs` processes: an equal share of the cores, or OMP_NUM_THREADS where that is less."""
    share = max(1, cores() // jobs)
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(wanted)) if wanted.isdigit() and int(wanted) > 0 else share


def spawn(module: str, arguments: list[str], threads: int, log: Path) -> subprocess.Popen[bytes]:
    """`python -m module arguments` in the background, out of reach of the terminal's Ctrl-C, its output added to `log`.

    Its standard input is a pipe that closes when this process ends, however it ends.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )


def stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Let attended processes save what they have and end; a second Ctrl-C kills them."""
    processes = list(processes)
    for process in processes:
        if process.stdin is not None:
            process.stdin.close()
    try:
        for process in processes:
            process.wait()
    except BaseException:
        for process in processes:
            process.kill()
        raise


@dataclass
class CellPool:
    """Runs cells.

    Attributes:
        out: folder of all models and cells.
        jobs: processes at a time.
        report: called once for every cell, with its result and whether it was there before.
    """

    out: Path
    jobs: int
    report: Callable[[Cell, RawResult, bool], None]
    running: dict[str, tuple[Cell, subprocess.Popen[bytes]]] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)

    def run(self, cells: dict[str, Cell]) -> dict[str, RawResult]:
        """Results by key. Cells that have one are not run again; those whose needs failed have a result that says so."""
        waiting, results = dict(cells), dict[str, RawResult]()
        for key in cells:
            prepare(self.out, cells[key])

        def settle(cell: Cell, result: RawResult, before: bool) -> None:
            results[cell.key] = result
            waiting.pop(cell.key, None)
            self.report(cell, result, before)

        first = True
        try:
            while waiting or self.running:
                self._collect()
                for cell in list(waiting.values()):
                    if cell.key in self.running:
                        continue
                    found = read_result(self.out, cell.key) or stopped_by(cell, cells, results.get)
                    if found is not None:
                        settle(cell, found, first)
                    elif all(need in results for need in cell.needs) and self._is_free(cell):
                        self._start(cell)
                first = False
                if waiting:
                    time.sleep(0.1)
        finally:
            stop(process for _, process in self.running.values())
        return results

    def _is_free(self, cell: Cell) -> bool:
        """Whether there is room for a process, and nobody trains or draws from the cell's model."""
        models = {running.model for running, _ in self.running.values()}
        return len(self.running) < self.jobs and cell.model not in models and not is_locked(lock_of(self.out, cell.model))

    def _start(self, cell: Cell) -> None:
        folder = self.out / "cells" / cell.key
        process = spawn("trigflow.lab.study.cell", [str(folder), "--attended"], threads_for(self.jobs), folder / "log.txt")
        self.attempts[cell.key] = self.attempts.get(cell.key, 0) + 1
        self.running[cell.key] = (cell, process)

    def _collect(self) -> None:
        """Take note of processes that have ended; those without a result are started again, or have failed."""
        for key, (_, process) in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[key]
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
            if read_result(self.out, key) is None and self.attempts[key] >= ATTEMPTS:
                write_json(self.out / "cells" / key / "result.json", _ended(process.returncode, self._last_words(key)))

    def _last_words(self, key: str) -> str:
        lines = (self.out / "cells" / key / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else ""


def prepare(out: Path, cell: Cell) -> None:
    """Write cell.json.

    Raises:
        UserError: where there is one already with other settings, from a version with other defaults.
    """
    folder = out / "cells" / cell.key
    description = cell.description()
    if (folder / "cell.json").is_file():
        found = read_json(folder / "cell.json", "cell")
        found["config"] = to_dict(from_dict(found["config"]))
        if found != description:
            raise UserError(
                f"'{folder}' was made by a version of trigflow with other defaults; expected the same settings; "
                "choose another --out"
            )
    else:
        ensure_folder(folder)
        write_json(folder / "cell.json", description)


def read_result(out: Path, key: str) -> RawResult | None:
    """The result of a cell, None while there is none."""
    file = out / "cells" / key / "result.json"
    return read_json(file, "result") if file.is_file() else None


def stopped_by(cell: Cell, cells: dict[str, Cell], find: Callable[[str], RawResult | None]) -> RawResult | None:
    """The result of a cell that cannot be run because one that it needs has failed, or has diverged without a score; None
    where nothing is known to stop it. `find` gives the result of a key, None where there is none."""
    for need in cell.needs:
        result = find(need)
        if result is not None and (
            result["status"] == "failed" or (result["status"] == "diverged" and not result.get("scores"))
        ):
            return {"status": result["status"], "reason": f"{cells[need].name}: {result['reason']}"}
    return None


def _ended(code: int, last_words: str) -> RawResult:
    """The result of a cell whose process ended without writing one."""
    if code < 0:
        return {"status": "failed", "reason": f"the process was killed by {signal.Signals(-code).name}"}
    return {"status": "failed", "reason": f"the process ended with code {code}: {last_words}"}
