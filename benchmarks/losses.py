"""The first losses of the digits demo, for a change of the code that must not change what is learned.

    python benchmarks/losses.py --write losses.json            # with the code as it was
    python benchmarks/losses.py --check losses.json            # with the code as it is: exit code 1 where they differ

Trains as `make demo` at seed 0 does, with the unmodified recipe `digits`, and stops after the first 100 steps: the teacher, and
the sCD student of that teacher as it was after step 100 (its averaged weights). Both with one thread and with two. A line of
metrics is written every step and a checkpoint after step 100; nothing of this changes the training. Everything goes through the
command line, so that the code may be rearranged freely.

The mean squared error `loss` of every step has to be equal to a relative tolerance of 1e-5. The norm of the gradient, and of
the student also that of the tangent, are written and shown beside it, but decide nothing: they show rounding sooner. Sums in
another order drift apart as training goes on: between one thread and two, by step 100, the teacher's loss by 4e-6 and the
student's by 5e-5 (at most 2e-5 and 4e-4 before), the student's norms by percents. So equal losses of the student say that the
arithmetic is the same nearly to the bit, and a step from which on they differ, where to look. Numbers are those of one
processor and one version of PyTorch; on another machine write them anew with the old code. About two minutes on two quiet
cores.

`tests/fixtures/format1/losses.json` was written with the code as of commit 9ba0477.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

STEPS = 100
TOLERANCE = 1e-5
THREADS = (1, 2)
DECIDES = " loss,"
"""In the name of the figures that have to be equal."""
FIGURES = {"teacher": ("loss", "grad_norm"), "student": ("loss", "grad_norm", "tangent_norm")}
OPTIONS = [
    *("--loop.seed", "0", "--loop.device", "cpu", "--loop.log-every", "1", "--loop.sample-every", "0"),
    *("--loop.keep-every", str(STEPS), "--quiet"),
]

Losses = dict[str, dict[str, list[float]]]
"""Figures by name, by run."""


def machine() -> dict[str, str]:
    """What the last digits depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {"processor": names[0] if names else platform.machine(), "torch": torch.__version__}


def command(*words: str, threads: int) -> subprocess.Popen[bytes]:
    """`trigflow` in a process of its own with so many threads."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return subprocess.Popen(
        [sys.executable, "-m", "trigflow", *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics that a run has written by now."""
    path = folder / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def first_steps(folder: Path, *words: str, threads: int) -> list[dict[str, Any]]:
    """The metrics of the first steps of a run, which is then stopped by SIGTERM and leaves a checkpoint.

    Raises:
        RuntimeError: if the run ends before that.
    """
    process = command(*words, "--out", str(folder), *OPTIONS, threads=threads)
    try:
        while len(lines_of(folder)) <= STEPS:  # one more: the checkpoint of the last one has been begun
            if process.poll() is not None:
                raise RuntimeError(f"trigflow {words[0]} ended: {process.stderr.read().decode() if process.stderr else ''}")
            time.sleep(0.05)
        process.terminate()
        process.wait(timeout=120)
    finally:
        process.kill()
        process.communicate()
    return lines_of(folder)[:STEPS]


def measure(threads: int) -> Losses:
    """The figures of teacher and student."""
    with tempfile.TemporaryDirectory() as scratch:
        run, teacher, student = (Path(scratch) / name for name in ("run", "teacher", "student"))
        found = {"teacher": first_steps(run, "train", "--preset", "digits", threads=threads)}
        made = command("checkpoint", str(run), "--at", str(STEPS), "--out", str(teacher), threads=threads)
        _, said = made.communicate()
        if made.returncode:
            raise RuntimeError(f"trigflow checkpoint ended: {said.decode()}")
        found["student"] = first_steps(student, "distill", str(teacher), "--preset", "digits", threads=threads)
    return {run: {name: [line[name] for line in lines] for name in FIGURES[run]} for run, lines in found.items()}


def differences(expected: dict[str, Losses], found: dict[str, Losses]) -> list[tuple[str, float, int | None]]:
    """For every figure its name, the largest relative difference, and the first step (from 1) beyond the tolerance."""
    rows = []
    for threads, runs in expected.items():
        for run, figures in runs.items():
            for name, numbers in figures.items():
                apart = [_apart(a, b) for a, b in zip(numbers, found[threads][run][name], strict=True)]
                beyond = next((step for step, value in enumerate(apart, start=1) if not value <= TOLERANCE), None)
                rows.append((f"{run} {name}, threads {threads}", max(apart), beyond))
    return rows


def _apart(a: float, b: float) -> float:
    """Relative difference; infinite where one of them is not finite (null in metrics)."""
    if a is None or b is None or not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b), sys.float_info.min)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, metavar="FILE", help="measure, and write the figures")
    what.add_argument("--check", type=Path, metavar="FILE", help="measure, and compare with those of a file")
    options = parser.parse_args(arguments)

    expected = None if options.check is None else json.loads(options.check.read_text(encoding="utf-8"))
    found = {str(threads): measure(threads) for threads in THREADS}
    if expected is None:
        facts = {"steps": STEPS, "machine": machine(), "losses": found}
        options.write.write_text(json.dumps(facts) + "\n", encoding="utf-8")
        for threads, runs in found.items():
            for run, figures in runs.items():
                print(f"{run}, threads {threads}: loss {figures['loss'][0]:.6f} ... {figures['loss'][-1]:.6f}")
        return 0
    here, there = machine(), expected["machine"]
    for name in ("processor", "torch"):
        if here[name] != there[name]:
            print(f"note: {name} was {there[name]} and is {here[name]}; differences may be of the machine")
    rows = differences(expected["losses"], found)
    for figure, largest, beyond in rows:
        print(f"{figure:36} {largest:8.1e}  {'equal' if beyond is None else f'differs from step {beyond} on'}")
    return int(any(beyond is not None for figure, _, beyond in rows if DECIDES in figure))


if __name__ == "__main__":
    sys.exit(main())
