"""Proof by fault: trainings are killed, starved of disk and fed with rubbish, and have to survive.

    python benchmarks/faults.py                          # everything, about a quarter of an hour
    python benchmarks/faults.py --only disk --seed 1     # one kind of fault, other random moments
    python benchmarks/faults.py --only kill --kills 500
    python benchmarks/faults.py --load 2                 # on a machine that is busy with something else

Real signals, real processes and a real small file system; nothing is mocked. Survived means: no traceback, nothing
half-written, and, where a training goes on afterwards, weights, averages, moments and losses equal bit for bit to those of a
training that was left alone. Prints survived / tried for each kind, and writes benchmarks/results/faults.json. The folder of
a fault that was not survived is kept. Ends with exit code 1 where there is one. For Linux; a small file system needs the right
to mount one, and without it the size of files is limited instead.
"""

from __future__ import annotations

import argparse
import atexit
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # before anything is imported: a process that is forked may have one thread only

if TYPE_CHECKING:
    from fault_cases.runs import Bench, Trial

KINDS = {
    "kill": "SIGKILL at random moments, half of them while a checkpoint is written",
    "terminate": "SIGTERM at random moments",
    "processes": "one of two processes killed",
    "disk": "disk full",
    "checkpoint": "checkpoint bit-flipped or truncated",
    "images": "damaged images",
    "numbers": "NaN in what is computed or kept",
}
COUNTS = {
    "--kills": ("kill", 50),
    "--terminations": ("terminate", 10),
    "--damages": ("checkpoint", 40),
    "--images": ("images", 200),
}
"""Options for the number of trials, where it is free; the kind, and the number otherwise."""


def trials_of(kind: str, bench: Bench, count: int) -> Iterator[Trial]:
    """The trials of one kind of fault: `count` of them, where their number is free."""
    from fault_cases import damage, disk, images, kills, numbers, processes

    if kind == "kill":
        return kills.kills(bench, count)
    if kind == "terminate":
        return kills.terminations(bench, count)
    if kind == "processes":
        return processes.losses(bench)
    if kind == "disk":
        return disk.shortages(bench)
    if kind == "checkpoint":
        return damage.damages(bench, count)
    if kind == "images":
        return images.rubbish(bench, count)
    return numbers.poisons(bench)


def try_all(kind: str, trials: Iterator[Trial], folder: Path) -> dict[str, Any]:
    """Run the trials one after another; what became of them, sums of what they counted and the most of what they measured."""
    from fault_cases.runs import Lost

    began, counts, most = time.perf_counter(), Counter[str](), dict[str, float]()
    result: dict[str, Any] = {"fault": KINDS[kind], "survived": 0, "tried": 0, "lost": []}
    for number, trial in enumerate(trials):
        place = folder / f"{kind}-{number:03d}"
        place.mkdir(parents=True)
        result["tried"] += 1
        try:
            found = trial.run(place)
        except Lost as lost:
            print(f"LOST  {trial.what}: {lost} (kept in {place})", flush=True)
            result["lost"].append({"what": trial.what, "why": str(lost)})
            continue
        for name, value in found.items():
            if isinstance(value, float):
                most[name] = max(most.get(name, 0.0), round(value, 2))
            else:
                counts[name] += value
        result["survived"] += 1
        shutil.rmtree(place)
    return result | {"counts": dict(counts), "most": most, "seconds": round(time.perf_counter() - began, 1)}


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=KINDS, nargs="+", default=list(KINDS), help="leave out the other kinds")
    parser.add_argument("--seed", type=int, default=0, help="of moments, positions and images")
    for name, (kind, usual) in COUNTS.items():
        parser.add_argument(name, dest=kind, type=int, default=usual, metavar="N", help=f"trials; {usual} by default")
    parser.add_argument("--at-most", type=int, metavar="N", help="trials of every kind, to see whether all of this works")
    parser.add_argument("--load", type=int, default=0, metavar="N", help="processes beside that are busy all the time")
    parser.add_argument("--folder", type=Path, help="for runs; one is made, and removed again if all is survived")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "faults.json")
    return parser


def main() -> None:
    args = options().parse_args()
    if sys.platform != "linux":
        raise SystemExit("the faults need fork, /proc and mount; expected Linux")
    import torch

    torch.set_num_threads(1)
    from fault_cases.runs import Bench

    from trigflow.runtime.files import write_json
    from trigflow.runtime.machine import machine

    folder = Path(tempfile.mkdtemp(prefix="faults-")) if args.folder is None else args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise SystemExit(f"'{folder}' is not empty; expected a new folder; choose another --folder")
    bench = Bench(folder, args.seed)
    for _ in range(args.load):
        busy = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
        atexit.register(subprocess.Popen([sys.executable, "-c", busy]).kill)
    began, kinds = time.perf_counter(), {}
    for kind in args.only:
        trials = itertools.islice(trials_of(kind, bench, getattr(args, kind, 0)), args.at_most)
        kinds[kind] = try_all(kind, trials, folder)
        found = kinds[kind]
        counted = "".join(f", {name.replace('_', ' ')}: {value}" for name, value in found["counts"].items())
        counted += "".join(f", {name.replace('_', ' ')}: at most {value}" for name, value in found["most"].items())
        line = f"{found['survived']:4} / {found['tried']:<4} {KINDS[kind]}"
        print(f"{line}  ({found['seconds']:.0f} s{counted})", flush=True)
    survived, tried = (sum(found[name] for found in kinds.values()) for name in ("survived", "tried"))
    result = {
        "command": shlex.join(["python", "benchmarks/faults.py", *sys.argv[1:]]),
        "machine": machine(),
        "seed": args.seed,
        "load": args.load,
        "seconds": round(time.perf_counter() - began, 1),
        "survived": survived,
        "tried": tried,
        "kinds": kinds,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.json, result)
    print(f"{survived} / {tried} survived in {result['seconds']:.0f} s")
    if survived == tried and args.folder is None:
        shutil.rmtree(folder)
    sys.exit(0 if survived == tried else 1)


if __name__ == "__main__":
    main()
