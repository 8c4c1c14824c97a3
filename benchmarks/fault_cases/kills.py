"""Processes that are killed, and processes that are asked to leave."""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fault_cases.runs import (
    CHECKPOINT_EVERY,
    ITERATIONS,
    Bench,
    Trial,
    being_written,
    checkpoints,
    expect,
    last_lines,
    newest,
    one_line,
    wait_until,
)
from trigflow.runtime.errors import EXIT_TERMINATED

WRITING = 0.5
"""Share of kills that are aimed at the moment in which a checkpoint is written."""
WRITES = 0.01
"""Seconds within which that kill comes, after the writing began."""
TWICE = 0.2
"""Share of runs whose resumed process is killed too."""


def kills(bench: Bench, count: int) -> Iterator[Trial]:
    """SIGKILL at random moments: of the whole life of a process, or while a checkpoint is being written."""
    for i in range(count):
        where = "writing" if i < WRITING * count else "anywhere"
        kind = "sct" if i % 5 == 4 else "teacher"
        yield Trial(f"SIGKILL {i}, {where}, {kind}", functools.partial(_kill, bench, i, where, kind))


def _kill(bench: Bench, index: int, where: str, kind: str, folder: Path) -> dict[str, Any]:
    random = bench.random("kill", index)
    bench.finished(kind)
    out, found = folder / "run", {"inside_a_checkpoint": 0, "kills": 0}
    for attempt in range(2 if random.random() < TWICE else 1):
        command = bench.start(out, *(("--resume", "auto") if attempt else ()), kind=kind)
        if where == "writing":
            at = random.randrange(ITERATIONS // CHECKPOINT_EVERY) * CHECKPOINT_EVERY
            wait_until(lambda: any(int(name[1:9]) > at for name in being_written(out)), command)  # noqa: B023
            time.sleep(random.random() * WRITES)
        else:
            time.sleep(random.random() * bench.seconds)
        command.send(signal.SIGKILL)
        found["kills"] += command.wait() == -signal.SIGKILL
        found["inside_a_checkpoint"] += bool(being_written(out))
    bench.resume(out, kind)
    bench.check_same(out, kind)
    return found


def terminations(bench: Bench, count: int) -> Iterator[Trial]:
    """SIGTERM at random moments of the training: a checkpoint of that very step, and a code that tells it from a fault."""
    for i in range(count):
        kind = "sct" if i % 5 == 4 else "teacher"
        yield Trial(f"SIGTERM {i}, {kind}", functools.partial(_terminate, bench, i, kind))


def _terminate(bench: Bench, index: int, kind: str, folder: Path) -> dict[str, Any]:
    random = bench.random("term", index)
    bench.finished(kind)
    out = folder / "run"
    command = bench.start(out, kind=kind)
    wait_until(lambda: checkpoints(out), command)
    time.sleep(random.random() * 0.8 * bench.seconds)
    before = int(newest(out).name)
    command.send(signal.SIGTERM)
    began = time.perf_counter()
    code = command.wait()
    if code == 0:  # it came after the last step
        bench.check_same(out, kind, lines=False)
        return {"after_the_last_step": 1}
    took = time.perf_counter() - began
    expect(code == EXIT_TERMINATED, f"exit code {code} instead of {EXIT_TERMINATED}: {last_lines(command.said())}")
    one_line(command.said())
    at = int(newest(out).name)
    expect(at >= before, f"the newest checkpoint is of iteration {at}, and there was one of {before}")
    bench.resume(out, kind)  # whose log lacks a line where the signal came before it was written
    bench.check_same(out, kind, lines=False)
    return {"left": 1, "between_checkpoints": at % CHECKPOINT_EVERY > 0, "seconds_to_leave": took}
