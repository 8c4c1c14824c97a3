"""Everything that needs a GPU, in one script with a limit of time: are the CUDA paths right, and what do steps cost?

    python benchmarks/gpu.py --minutes 8 --out runs/gpu        # on a machine with CUDA and this repository alone
    python benchmarks/gpu.py --dry --out /tmp/gpu              # toy sizes, on the CPU where there is no GPU
    python benchmarks/gpu.py --parts "steps edm2-s" attention  # some parts only

Where the package is not installed, `PYTHONPATH=src` is enough; `--dry` names what is missing.

Each part runs in a process of its own, within a limit of its own, and writes what it has found after every measurement: a part
that fails, or a machine that is taken away, costs that part alone. First, together, since no clock counts there: the kernels of
attention against double precision, the networks under `jvp` and compiled, tests of the suite on the device, resumed and sharded
training, the demo with three seeds, and the compilation of steps with their tangents.
Then, one after the other: compiled steps, steps of the published networks, attention alone, drawing in two steps.

Writes gpu.json (with the card, versions, the commit, and seconds of each part), and gpu.log, into the folder. A part that did
not run is listed with the reason.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NEEDED = {
    "torch": "PyTorch with CUDA",
    "numpy": "numpy",
    "PIL": "pillow",
    "safetensors": "safetensors",
    "dacite": "dacite",
    "tqdm": "tqdm",
    "tyro": "tyro",
}
"""Modules without which nothing runs, and what installs them."""
HELPFUL = {
    "triton": "triton (comes with PyTorch for CUDA): kernels",
    "sklearn": "scikit-learn: the digits",
    "jinja2": "jinja2: the demo",
    "tensorboard": "tensorboard: the demo",
    "pytest": "pytest: tests",
    "xdist": "pytest-xdist: tests",
    "hypothesis": "hypothesis: tests",
    "diffusers": "diffusers: tests",
    "jvp_flash_attention": "jvp-flash-attention: a rival of the kernel",
}
"""Modules that some part asks for."""
KERNELS = 4
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Part:
    """One entry of the result."""

    name: str
    seconds: float
    """Its limit."""
    alone: bool = False
    """Measured while nothing else runs; for `prepared`, after its preparation, which runs with the others."""
    prepared: bool = False


PARTS = [
    Part("compiled ddpmpp", 10, alone=True, prepared=True),
    Part("compiled edm2-s", 10, alone=True, prepared=True),
    *(Part(f"kernels {i}", 110) for i in range(KERNELS)),
    Part("networks", 80),
    Part("compile-check", 150),
    Part("tests needs", 120),
    Part("tests engine", 130),
    Part("tests training", 130),
    Part("resume", 80),
    Part("sharding", 60),
    *(Part(f"demo {seed}", 160) for seed in SEEDS),
    Part("steps ddpmpp", 38, alone=True),
    Part("steps edm2-s", 28, alone=True),
    Part("attention", 30, alone=True),
    Part("steps edm2-xxl", 30, alone=True),
    Part("drawing", 30, alone=True),
    Part("steps dit-xl", 18, alone=True),
]
TOGETHER = 180.0
"""Seconds for what runs together, preparations included."""


class Child:
    """A part in its process: started early, so that its imports are over when its turn comes."""

    def __init__(self, part: Part, folder: Path, log: Any, dry: bool) -> None:
        self.part = part
        self.path = folder / f"{part.name.replace(' ', '-')}.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--part", part.name, "--out", str(self.path)]
        command += ["--dry"] if dry else []
        interpreted = "kernels" in part.name or part.name == "attention"
        environment = {**os.environ, "TRITON_INTERPRET": "1"} if dry and interpreted else None
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, text=True, process_group=0, env=environment
        )
        self.reason: str | None = None

    def go(self, seconds: float) -> None:
        """Tell it to begin."""
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(f"{seconds}\n")
            self.process.stdin.flush()
        except OSError:
            self.reason = "ended before its turn"

    def found(self) -> dict[str, Any]:
        """What it has written."""
        try:
            return dict(json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def ready(self) -> bool:
        """Whether it has prepared itself, or ended."""
        return self.process.poll() is not None or self.found().get("stage") == "ready"

    def stop(self, reason: str) -> None:
        """End it and its own processes."""
        if self.process.poll() is None:
            self.reason = reason
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def result(self) -> dict[str, Any]:
        """What it has found, with how it ended where that was not well."""
        found = self.found()
        code = self.process.poll()
        if self.reason or code:
            found["ended"] = self.reason or f"exit code {code}"
        return found


class Runner:
    """Runs parts and keeps gpu.json up to date."""

    def __init__(self, out: Path, minutes: float, dry: bool) -> None:
        self.out, self.dry = out, dry
        self.deadline = time.monotonic() + 60 * minutes
        self.log = (out / "gpu.log").open("a", encoding="utf-8")
        self.temporary = tempfile.TemporaryDirectory()
        self.children: list[Child] = []
        self.result: dict[str, Any] = {"command": "python benchmarks/gpu.py " + " ".join(sys.argv[1:]), "dry": dry}
        self.not_run: dict[str, str] = {}

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def start(self, part: Part) -> Child:
        child = Child(part, Path(self.temporary.name), self.log, self.dry)
        self.children.append(child)
        return child

    def write(self) -> None:
        """gpu.json, replaced in one go."""
        parts = {child.part.name: child.result() for child in self.children}
        text = json.dumps({**self.result, "parts": parts, "not_run": self.not_run}, indent=1)
        new = self.out / "gpu.new"
        new.write_text(text, encoding="utf-8")
        os.replace(new, self.out / "gpu.json")

    def run(self, parts: list[Part]) -> None:
        """What may run together, then the rest one by one."""
        together = [part for part in parts if not part.alone]
        prepared = [part for part in parts if part.prepared]
        alone = [part for part in parts if part.alone and not part.prepared]
        limit = time.monotonic() + min(TOGETHER, 0.55 * self.left()) if not self.dry else time.monotonic() + 600
        waiting = prepared + together
        most = len(waiting) if not self.dry else max(1, (os.cpu_count() or 2))
        running: dict[Child, float] = {}
        preparing: list[Child] = []
        while waiting or running or any(not child.ready() for child in preparing):
            while waiting and len(running) + sum(not c.ready() for c in preparing) < most:
                part = waiting.pop(0)
                child = self.start(part)
                seconds = min(TOGETHER if part.prepared else part.seconds, limit - time.monotonic())
                child.go(seconds)
                if part.prepared:
                    preparing.append(child)
                else:
                    running[child] = time.monotonic() + seconds + 5
            for child, end in list(running.items()):
                if child.process.poll() is not None or time.monotonic() > min(end, limit):
                    child.stop("its time was over")
                    del running[child]
                    self.say(child)
            if time.monotonic() > limit:
                for child in preparing:
                    if not child.ready():
                        child.stop(f"its time was over at the stage '{child.found().get('stage')}'")
                        self.say(child)
            time.sleep(0.2)
            self.write()
        queue: list[tuple[Child | None, Part]] = [(c, c.part) for c in preparing if c.process.poll() is None]
        queue += [(None, part) for part in alone]
        following: Child | None = None
        for i, (child, part) in enumerate(queue):
            if self.left() < min(10.0, part.seconds) and not self.dry:
                self.not_run[part.name] = "no time was left"
                if child is not None:
                    child.stop("no time was left")
                continue
            child = child or following or self.start(part)
            following = None
            seconds = part.seconds if self.dry else min(part.seconds, self.left() - 2)
            self.wait_for_imports(child)
            child.go(seconds)
            if i + 1 < len(queue) and queue[i + 1][0] is None:
                following = self.start(queue[i + 1][1])
            end = time.monotonic() + seconds + (600 if self.dry else 8)
            while child.process.poll() is None and time.monotonic() < min(end, self.deadline if not self.dry else end):
                time.sleep(0.1)
            child.stop("its time was over")
            self.say(child)
            self.write()
        if following is not None:
            following.stop("no time was left")
        self.write()

    def wait_for_imports(self, child: Child) -> None:
        """Until it says that it could begin."""
        end = time.monotonic() + 40
        while child.process.poll() is None and not child.path.is_file() and time.monotonic() < end:
            time.sleep(0.05)

    def say(self, child: Child) -> None:
        found = child.result()
        if child.part.name in ("resume", "demo") or found:
            print(f"[{self.left():5.0f} s left] {summary_of(child.part.name, found)}", flush=True)
        if "ended" in found:
            print(f"    {child.part.name}: {found['ended']}", flush=True)

    def close(self) -> None:
        for child in self.children:
            child.stop("the script ended")
        self.write()
        self.log.close()


def summary_of(name: str, found: dict[str, Any]) -> str:
    """A line on a part, without importing PyTorch here."""
    skip = {"seconds", "rounds", "figures", "cases", "kinds", "failed", "command", "what"}
    shown = {key: value for key, value in found.items() if key not in skip}
    cases = {key: len(found[key]) for key in ("cases", "kinds", "shapes") if key in found}
    shown = {key: value for key, value in shown.items() if key not in cases}
    text = json.dumps({**cases, **shown})
    return f"{name} ({found.get('seconds')} s): {text[:400]}"


def run_part(name: str, path: Path, dry: bool) -> None:
    """The child: import, say so, wait for the word, run."""
    sys.path.insert(0, str(HERE))
    sys.path.insert(0, str(HERE.parent / "src"))
    import torch

    if dry:
        torch.set_num_threads(1)
    from gpu_parts.record import Record

    function = function_of(name)
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    record = Record(path, 1e9)
    prepared = next(part.prepared for part in PARTS if part.name == name)
    record.put("stage", "imported")
    if prepared:
        seconds = float(sys.stdin.readline() or 1e9)
        record.restart(seconds)
        function(record, dry)
        return
    seconds = float(sys.stdin.readline() or 1e9)
    record.restart(seconds)
    record.entries.pop("stage")
    function(record, dry)
    record.write()


def function_of(name: str) -> Callable[[Any, bool], None]:
    """What a part calls."""
    kind, _, argument = name.partition(" ")
    if kind == "kernels":
        from gpu_parts import kernels

        return functools.partial(kernels.run, share=int(argument), shares=KERNELS)
    if kind == "networks":
        from gpu_parts import networks

        return networks.run
    if kind == "tests":
        from gpu_parts import tests

        return functools.partial(tests.run, name=argument)
    if kind in ("resume", "sharding", "demo"):
        from gpu_parts import training

        found: Any = getattr(training, kind)
        return functools.partial(found, seed=int(argument)) if argument else found
    if kind == "steps":
        from gpu_parts import steps

        return functools.partial(steps.run, name=argument)
    if kind == "compile-check":
        from gpu_parts import checked

        return checked.run
    if kind == "attention":
        from gpu_parts import attention

        return attention.run
    if kind == "drawing":
        from gpu_parts import drawing

        return drawing.run
    from gpu_parts import compiled

    def both(record: Any, tiny: bool) -> None:
        step, able = compiled.prepare(record, tiny, argument)
        seconds = float(sys.stdin.readline() or 0)  # the second word: alone now
        record.put("prepared_in_seconds", record.entries["seconds"])
        record.restart(seconds)
        compiled.measure(record, step, able, tiny)
        record.put("stage", "measured")

    return both


def missing(modules: dict[str, str]) -> list[str]:
    """What cannot be found here."""
    return [f"{module}: {what}" for module, what in modules.items() if importlib.util.find_spec(module) is None]


def environment() -> dict[str, Any]:
    """Of gpu_parts.record, from a process of its own."""
    code = "import json; from gpu_parts.record import environment; print(json.dumps(environment()))"
    paths = os.pathsep.join([str(HERE), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths}
    )
    return dict(json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 else {"error": done.stderr[-500:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (8)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of gpu.json and gpu.log (runs/gpu)")
    parser.add_argument("--dry", action="store_true", help="toy sizes: does everything run?")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="; ".join(part.name for part in PARTS))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        run_part(args.part, args.out, args.dry)
        return
    known = [part.name for part in PARTS]
    if unknown := [name for name in args.parts or [] if name not in known]:
        parser.error(f"no part '{unknown[0]}'; expected some of {'; '.join(known)}")
    if args.minutes <= 0:
        parser.error("--minutes must be above 0")
    if lacking := missing(NEEDED):
        parser.exit(2, "missing here:\n  " + "\n  ".join(lacking) + "\n")
    sys.path.insert(0, str(HERE.parent / "src"))
    for line in missing(HELPFUL):
        print(f"missing here, its part is left out or fails: {line}")
    args.out.mkdir(parents=True, exist_ok=True)
    runner = Runner(args.out, args.minutes, args.dry)
    try:
        runner.result["missing"] = missing(HELPFUL)
        runner.result["environment"] = environment()
        device = runner.result["environment"].get("device")
        print(json.dumps(runner.result["environment"]), flush=True)
        if device == "cpu" and not args.dry:
            parser.exit(2, "no CUDA device here; --dry runs everything at toy size\n")
        runner.run([part for part in PARTS if args.parts is None or part.name in args.parts])
    finally:
        runner.close()
    failed = {c.part.name: c.result()["ended"] for c in runner.children if "ended" in c.result()}
    failures = sum(len(c.result().get("failures", [])) for c in runner.children)
    ran = len(runner.children) - len(failed)
    print(f"{ran} of {len(runner.children) + len(runner.not_run)} parts ran to their end, {failures} failures inside them")
    sys.exit(1 if args.dry and (failed or failures) else 0)


if __name__ == "__main__":
    main()
