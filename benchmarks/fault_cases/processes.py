"""Two processes that train together, of which one is killed, or stands still."""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fault_cases.runs import PATIENCE, Bench, Command, Trial, checkpoints, expect, last_lines, wait_until

WITHIN = 60.0
"""Seconds in which the process that is left has to leave."""
KIND = "two processes"


def losses(bench: Bench) -> Iterator[Trial]:
    """Processes started by hand, whose survivor has to notice, and processes of torchrun, which starts them again."""
    for i in range(4):
        yield Trial(f"process {i % 2} of 2 killed ({i})", functools.partial(_lose, bench, i, signal.SIGKILL))
    yield Trial("process 1 of 2 stands still", functools.partial(_lose, bench, 5, signal.SIGSTOP))
    for i in range(2):
        yield Trial(f"process {i} of torchrun killed, and started again", functools.partial(_restart, bench, i))


def start_two(bench: Bench, out: Path, *more: object) -> list[Command]:
    """A training in two processes, with what torchrun would tell them."""
    port, count = free_port(), len(list(out.parent.glob(f"{out.name}-*.err")))
    commands = []
    for rank in range(2):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        log = out.parent / f"{out.name}-{count}-{rank}"
        words = (*bench.train(out), "--parallel.timeout", WITHIN / 3, *more)
        commands.append(Command(words, log, environment=environment))
    return commands


def _undisturbed(bench: Bench) -> None:
    """What two processes end with that nothing happens to."""
    if KIND not in bench.references:
        out = bench.folder / "uninterrupted" / "two"
        out.parent.mkdir(parents=True, exist_ok=True)
        for command in start_two(bench, out):
            command.ends_well()
        bench.references[KIND] = out


def _lose(bench: Bench, index: int, number: int, folder: Path) -> dict[str, Any]:
    _undisturbed(bench)
    random, out = bench.random("processes", index), folder / "run"
    commands = start_two(bench, out)
    lost, left = commands[index % 2], commands[1 - index % 2]
    wait_until(lambda: checkpoints(out), left)
    time.sleep(random.random() * 0.2)
    lost.send(number)
    began = time.perf_counter()
    try:
        said = left.ends_with_one_line(seconds=WITHIN)
    finally:
        lost.send(signal.SIGKILL)
        lost.wait()
    took = time.perf_counter() - began
    expect("another process of this run has gone" in said, f"unclear: {said}")
    for command in start_two(bench, out, "--resume", "auto"):
        command.ends_well()
    bench.check_same(out, KIND)
    return {"seconds_to_leave": took}


def _restart(bench: Bench, rank: int, folder: Path) -> dict[str, Any]:
    _undisturbed(bench)
    out, said = folder / "run", folder / "torchrun.err"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    torchrun += ["--master-port", str(free_port()), "-m", "trigflow"]
    words = [str(word) for word in (*bench.train(out), "--resume", "auto", "--parallel.timeout", WITHIN)]
    with said.open("wb") as log:
        agent = subprocess.Popen([*torchrun, *words], stdout=log, stderr=log)
    try:
        end = time.perf_counter() + PATIENCE
        while not checkpoints(out):
            expect(agent.poll() is None and time.perf_counter() < end, f"did not begin: {last_lines(said.read_text())}")
            time.sleep(0.001)
        killed = next(pid for pid in children(agent.pid) if environment_of(pid).get("RANK") == str(rank))
        os.kill(killed, signal.SIGKILL)
        code = agent.wait(2 * PATIENCE)
    except subprocess.TimeoutExpired:
        expect(False, f"torchrun did not end: {last_lines(said.read_text())}")
    finally:
        for pid in [*children(agent.pid), agent.pid] if agent.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        agent.wait()
    expect(code == 0, f"torchrun ended with {code}: {last_lines(said.read_text())}")
    bench.check_same(out, KIND)
    return {"restarts": 1}


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def environment_of(pid: int) -> dict[str, str]:
    """The environment that a process was started with."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
