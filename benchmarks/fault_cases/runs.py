"""A training small enough to be stopped many times, in processes of its own, and what it leaves behind."""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trigflow import cli
from trigflow.runtime.errors import EXIT_FAILED
from trigflow.runtime.files import read_tensors
from trigflow.training.log import read_metrics

IMPORTED = ("trigflow.training.runs", "trigflow.data.check", "torch._dynamo", "torch.utils.tensorboard")
"""What commands import late, and the process that is forked has imported before."""
ITERATIONS = 40
CHECKPOINT_EVERY = 4
SAMPLE_EVERY = 20
PATIENCE = 120.0
"""Seconds after which a process that should have ended counts as hanging."""

NETWORK = ("--network.width", 8, "--network.blocks", 1, "--network.conditioning.width", 8, "--network.dropout", 0.1)
LOOP = (
    "--iterations", ITERATIONS, "--batch-size", 16, "--loop.checkpoint-every", CHECKPOINT_EVERY, "--loop.sample-every",
    SAMPLE_EVERY, "--loop.log-every", 1, "--ema.snapshot-every", 20, "--loop.device", "cpu", "--quiet",
)  # fmt: skip


class Lost(Exception):
    """A fault was not survived; the message says what happened."""


def expect(fine: bool, what: str) -> None:
    """Raise `Lost` unless `fine`."""
    if not fine:
        raise Lost(what)


@dataclass(frozen=True)
class Trial:
    """One fault that is to be survived.

    Attributes:
        what: the fault in words.
        run: does it in an empty folder; raises `Lost` where it is not survived, and returns what it found out.
    """

    what: str
    run: Callable[[Path], dict[str, Any]]


class Command:
    """A command of trigflow in a process of its own, forked from this one, where everything is imported already.

    It is a whole process with the threads it starts itself; only the seconds of importing are saved. Forking is safe because
    this process has a single thread, which is checked.

    Args:
        words: what follows `trigflow` on the command line.
        log: what it says goes to `LOG.out` and `LOG.err`.
        call: a function to call in place of the command line.
        environment: variables to set.
    """

    def __init__(
        self,
        words: tuple[object, ...],
        log: Path,
        *,
        call: Callable[[], Any] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        if sys.platform == "linux" and (threads := len(os.listdir("/proc/self/task"))) > 1:
            raise RuntimeError(f"{threads} threads in the process to fork; expected one")
        self.words = tuple(map(str, words))
        self.out, self.err = log.with_suffix(".out"), log.with_suffix(".err")
        self.call, self.environment = call, environment or {}
        self.process = multiprocessing.get_context("fork").Process(target=self._run)
        self.began = time.perf_counter()
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.is_alive()

    def send(self, number: int) -> None:
        """Send a signal, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit code, or the number of the signal that ended it, negative.

        Raises:
            Lost: when it hangs.
        """
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise Lost(f"did not end within {seconds:.0f} s: {' '.join(self.words)}")
        assert self.process.exitcode is not None
        return self.process.exitcode

    def said(self) -> str:
        """What it wrote to stderr so far."""
        return self.err.read_text(encoding="utf-8", errors="replace") if self.err.exists() else ""

    def ends_well(self) -> None:
        """Wait for exit code 0."""
        code = self.wait()
        expect(code == 0, f"exit code {code} instead of 0: {last_lines(self.said())}")
        expect("Traceback" not in self.said(), f"a traceback: {last_lines(self.said())}")

    def ends_with_one_line(self, code: int = EXIT_FAILED, seconds: float = PATIENCE) -> str:
        """Wait for this exit code and a single line of error; returns that line."""
        found = self.wait(seconds)
        expect(found == code, f"exit code {found} instead of {code}: {last_lines(self.said())}")
        return one_line(self.said())

    def _run(self) -> None:
        os.setsid()
        for path, stream in ((self.out, 1), (self.err, 2)):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(handle, stream)
            os.close(handle)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.update(self.environment)
        if self.call is None:
            cli.main(list(self.words))
        else:
            self.call()


def one_line(said: str) -> str:
    """The only line that starts with `trigflow: `, apart from warnings, where there is no traceback."""
    expect("Traceback" not in said, f"a traceback: {last_lines(said)}")
    lines = [line for line in said.splitlines() if line.startswith("trigflow: ") and "warning:" not in line]
    expect(len(lines) == 1, f"{len(lines)} lines instead of one: {last_lines(said)}")
    return lines[0]


def last_lines(said: str, count: int = 3) -> str:
    """The end of what was said, in one line."""
    return " | ".join(said.strip().splitlines()[-count:]) or "nothing said"


# The training ------------------------------------------------------------------------------------------------------------


class Bench:
    """What all trials share: data, and what uninterrupted runs end with.

    Args:
        folder: of everything that is written.
        seed: everything random derives from it.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.data = make_images(folder / "images", seed)
        self.references: dict[str, Path] = {}
        self.seconds = 0.0
        for module in IMPORTED:
            importlib.import_module(module)

    def random(self, *name: object) -> random.Random:
        """Random numbers of their own for each use."""
        return random.Random(f"{self.seed} {name}")

    def train(self, out: Path, kind: str = "teacher") -> tuple[object, ...]:
        """The command line of a training: teacher (diffusion, Adam) or sct (Muon; data read by a worker process)."""
        words: tuple[object, ...] = ("train", "--preset", "digits", "--data", self.data, "--out", out, *NETWORK, *LOOP)
        if kind == "sct":
            words += ("--objective.kind", "sct", "--optimizer.name", "muon", "--network.width", 32)
            words += ("--data.memory-gib", 0, "--data.workers", 1)
        return words

    def start(self, out: Path, *more: object, kind: str = "teacher", log: Path | None = None) -> Command:
        """Start a training; what it says is beside the run folder, where no other place is given."""
        count = len(list(out.parent.glob(f"{out.name}-*.err")))
        return Command((*self.train(out, kind), *more), log or out.parent / f"{out.name}-{count}")

    def resume(self, out: Path, kind: str = "teacher") -> Command:
        """Go on with a training, from its newest whole checkpoint, to the end; fails unless it ends well."""
        command = self.start(out, "--resume", "auto", kind=kind)
        command.ends_well()
        return command

    def finished(self, kind: str = "teacher") -> Path:
        """The run folder of an uninterrupted training; not to be changed."""
        if kind not in self.references:
            folder = self.folder / "uninterrupted" / kind
            folder.parent.mkdir(parents=True, exist_ok=True)
            command = self.start(folder, kind=kind)
            command.ends_well()
            self.seconds = time.perf_counter() - command.began
            self.references[kind] = folder
        return self.references[kind]

    def check_same(self, out: Path, kind: str = "teacher", *, lines: bool = True, snapshots: bool = True) -> None:
        """Raise `Lost` unless this run ended exactly as the uninterrupted one: all that it is made of has the same bits.

        Args:
            out: its folder.
            kind: which uninterrupted one.
            lines: whether no line of the log may be missing.
            snapshots: whether no snapshot may be missing.
        """
        there, here = self.finished(kind), out
        for name in ("network.safetensors", *(f"ema/{path.name}" for path in (there / "ema").glob("*.safetensors"))):
            if snapshots or (here / name).exists() or "/" not in name:
                check_tensors(read_tensors(there / name, name), read_tensors(here / name, name), name)
        check_tensors(checkpoint_tensors(newest(there)), checkpoint_tensors(newest(here)), "the last checkpoint")
        theirs, mine = ({line["iteration"]: line["loss"] for line in read_metrics(run)} for run in (there, here))
        expect(all(theirs[i] == loss for i, loss in mine.items()), "other losses in metrics.jsonl")
        expect(mine.keys() == theirs.keys() or not lines, f"{len(mine)} lines in metrics.jsonl, not {len(theirs)}")
        left = leftovers(here)
        expect(not left, f"left behind: {', '.join(left)}")


def make_images(folder: Path, seed: int, count: int = 64) -> Path:
    """Random 8x8 gray PNGs in two classes."""
    generator = np.random.default_rng(seed)
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return folder


def check_tensors(expected: dict[str, Tensor], found: dict[str, Tensor], what: str) -> None:
    """Raise `Lost` unless both hold the same bits under the same names."""
    names = [n for n in {**expected, **found} if n not in expected or n not in found or not _same(expected[n], found[n])]
    expect(not names, f"{what} differs from that of an uninterrupted run in {len(names)} tensors, first {names[:1]}")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


# What is in a run folder -------------------------------------------------------------------------------------------------


def checkpoints(run: Path) -> list[Path]:
    """Folders with the name of a checkpoint, whole or not, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("[0-9]*") if path.name.isdigit())


def newest(run: Path) -> Path:
    """The folder of the newest checkpoint."""
    found = checkpoints(run)
    expect(bool(found), f"no checkpoint in {run}")
    return found[-1]


def checkpoint_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, read with nothing of the code under test but safetensors."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.rglob("*.safetensors")):
        tensors |= read_tensors(file, "checkpoint")
    expect(bool(tensors), f"no tensors in {path}")
    return tensors


def leftovers(run: Path) -> list[str]:
    """Files and folders of a run that are under a temporary name."""
    return sorted(str(path.relative_to(run)) for path in run.rglob(".*"))


def being_written(run: Path, part: str = "checkpoints") -> list[str]:
    """Temporary names in a sub-folder of a run: what has not been written to the end. What is being deleted does not count."""
    try:
        names = [entry.name for entry in os.scandir(run / part)]
    except FileNotFoundError:
        return []
    return [name for name in names if name.startswith(".") and not name.endswith("-obsolete")]


def wait_until(there: Callable[[], Any], command: Command, seconds: float = PATIENCE) -> bool:
    """Wait, without sleeping long, until something is so; false when the command has ended before.

    Raises:
        Lost: when it takes too long.
    """
    end = time.perf_counter() + seconds
    while not there():
        if not command.running():
            return bool(there())
        expect(time.perf_counter() < end, f"nothing happened for {seconds:.0f} s: {' '.join(command.words)}")
        time.sleep(0.0002)
    return True


@contextlib.contextmanager
def stopped(command: Command) -> Iterator[None]:
    """Hold a process still (SIGSTOP) while the block lasts."""
    command.send(signal.SIGSTOP)
    try:
        yield
    finally:
        command.send(signal.SIGCONT)


def copy(run: Path, to: Path) -> Path:
    """A copy of a run folder."""
    return Path(shutil.copytree(run, to))


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
