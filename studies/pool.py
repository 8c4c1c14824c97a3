"""A few processes at a time: starts cells whose needs are met, and records those that end without a result.

What processes must not do at once they do under a lock, which the system releases when a process ends, however it ends.
"""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from studies.study_plan import Cell
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import read_json, write_json
from trigflow.training.config import from_dict, to_dict

ROOT = Path(__file__).parents[1]
"""The clone, in which processes of cells find this package whatever the folder they run in."""

RawResult = dict[str, Any]
"""Content of a result.json: status, reason and figures, see `studies.cell.run_cell`."""

ATTEMPTS = 2
"""Processes of a cell that may end by a signal, or without saying why, before the cell has failed."""


def lock_of(out: Path, name: str) -> FileLock:
    """The lock of a run folder below `out`: who holds it may train or draw from that model."""
    (out / "locks").mkdir(parents=True, exist_ok=True)
    return FileLock(out / "locks" / name.replace("/", "-"))


def is_held(lock: FileLock) -> bool:
    """Whether somebody holds the lock."""
    try:
        with lock.acquire(timeout=0):
            return False
    except Timeout:
        return True


def threads_for(jobs: int) -> int:
    """Threads of each of `jobs` processes: an equal share of the cores, or OMP_NUM_THREADS where that is less."""
    share = max(1, cores() // jobs)
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(wanted)) if wanted.isdigit() and int(wanted) > 0 else share


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spawn(folder: Path, threads: int) -> subprocess.Popen[bytes]:
    """The process of a cell, out of reach of the terminal's Ctrl-C, its output added to log.txt.

    Its standard input is a pipe that closes when this process ends, however it ends.
    """
    places = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with (folder / "log.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "studies.cell", str(folder), "--attended"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )


def prepare(out: Path, cell: Cell) -> None:
    """Write cell.json.

    Raises:
        UserError: where there is one already with other settings, from a version with other defaults.
    """
    file = out / "cells" / cell.key / "cell.json"
    if not file.is_file():
        write_json(file, cell.description())
        return
    found = read_json(file, "cell")
    found["config"] = to_dict(from_dict(found["config"]))
    if found != cell.description():
        raise UserError(
            f"'{file.parent}' was made by a version of trigflow with other defaults; expected the same settings; "
            "choose another --out"
        )


def settle(out: Path, cells: Mapping[str, Cell], results: dict[str, RawResult], waiting: Container[str] = ()) -> list[Cell]:
    """Add to `results` what is known by now, and return the cells whose results they are, without those still `waiting`.

    A cell has its own result, or that of one that it needs and that has failed, or has diverged without a score.
    """
    settled = []
    for key, cell in cells.items():
        if key in results or key in waiting:
            continue
        file = out / "cells" / key / "result.json"
        found = read_json(file, "result") if file.is_file() else None
        for need in cell.needs:
            other = results.get(need, {"status": "missing"})
            if found is None and other["status"] in ("failed", "diverged") and not other.get("scores"):
                found = {"status": other["status"], "reason": f"{cells[need].name}: {other['reason']}"}
        if found is not None:
            results[key] = found
            settled.append(cell)
    return settled


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
    attempts: Counter[str] = field(default_factory=Counter)

    def run(self, cells: dict[str, Cell]) -> dict[str, RawResult]:
        """Results by key. Cells that have one are not run again; those whose needs failed have a result that says so."""
        for cell in cells.values():
            prepare(self.out, cell)
        results: dict[str, RawResult] = {}
        before = True
        try:
            while True:
                self._collect()
                for cell in settle(self.out, cells, results, self.running):
                    self.report(cell, results[cell.key], before)
                before = False
                if len(results) == len(cells):
                    return results
                for key, cell in cells.items():
                    ready = key not in results and key not in self.running and all(need in results for need in cell.needs)
                    if ready and self._is_free(cell):
                        self._start(cell)
                time.sleep(0.1)
        finally:
            self._stop()

    def _is_free(self, cell: Cell) -> bool:
        """Whether there is room for a process, and nobody trains or draws from the cell's model."""
        models = {running.model for running, _ in self.running.values()}
        return len(self.running) < self.jobs and cell.model not in models and not is_held(lock_of(self.out, cell.model))

    def _start(self, cell: Cell) -> None:
        self.attempts[cell.key] += 1
        self.running[cell.key] = cell, spawn(self.out / "cells" / cell.key, threads_for(self.jobs))

    def _collect(self) -> None:
        """Take note of processes that have ended; those without a result are started again, or have failed."""
        for key, (_, process) in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[key]
            _let_go(process)
            folder = self.out / "cells" / key
            if (folder / "result.json").is_file() or self.attempts[key] < ATTEMPTS:
                continue
            words = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            signalled = f"was killed by {signal.Signals(-code).name}" if code < 0 else ""
            reason = signalled or f"ended with code {code}: {words[-1] if words else ''}"
            write_json(folder / "result.json", {"status": "failed", "reason": f"the process {reason}"})

    def _stop(self) -> None:
        """Let processes save what they have and end; a second Ctrl-C kills them."""
        processes = [process for _, process in self.running.values()]
        try:
            for process in processes:
                _let_go(process)
            for process in processes:
                process.wait()
        except BaseException:
            for process in processes:
                process.kill()
            raise


def _let_go(process: subprocess.Popen[bytes]) -> None:
    """Close the standard input of a process, by which it knows that nobody waits for it."""
    if process.stdin is not None:
        process.stdin.close()
