"""Several processes against one: throughput, equal losses, and what the shared random numbers cost.

    python benchmarks/scale.py                        # two processes of one thread against one process of two threads
    python benchmarks/scale.py --processes 4 --json /tmp/four.json

Writes benchmarks/results/scale.json. Throughput: the same teacher and student (recipes `digits`, whose steps take some 50 ms,
and `mnist`, of some 200 ms; global batch of the recipe), in a process group over gloo on this machine and in one process with
as many threads, measured in turn. Losses: a teacher, sCT and sCD of 50 steps on digits in 1, 2 and 4 processes, with `ddp` and
`fsdp`. Drawing: seconds a step in which a process draws the random numbers of a whole batch, of which it uses its share.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from trigflow.data.config import load_data
from trigflow.lab.recipes import get_recipe
from trigflow.models.model import Model
from trigflow.networks import UNetConfig, build
from trigflow.objectives import as_kind
from trigflow.runtime.distributed import is_first, process_group
from trigflow.runtime.files import write_json
from trigflow.runtime.heap import freed_memory_kept
from trigflow.runtime.machine import machine
from trigflow.training.config import ParallelConfig, RunConfig
from trigflow.training.log import read_metrics
from trigflow.training.setup import fit_network
from trigflow.training.trainer import Trainer

BAR = 0.85
STEPS, WARMUP = 30, 5
LOSS_STEPS = 50
SHAPES = {"CIFAR-10": (512, 3, 32, 32), "ImageNet 64": (2048, 3, 64, 64), "ImageNet 512 (latents)": (2048, 4, 64, 64)}


# In each process ---------------------------------------------------------------------------------------------------------


def make_trainer(name: str, kind: str, mode: str, folder: Path, *, small: bool = False) -> Trainer:
    """A run of the recipe of this name and kind: diffusion, sct or scd. The teacher is not trained, which costs the same."""
    recipe = get_recipe(name)
    config: RunConfig = recipe.teacher if kind == "diffusion" else recipe.student
    loop = dataclasses.replace(
        config.loop, iterations=LOSS_STEPS, log_every=1, sample_every=0, checkpoint_every=0, device="cpu"
    )
    config = dataclasses.replace(
        config,
        objective=as_kind(config.objective, kind),
        loop=dataclasses.replace(loop, batch_size=16) if small else loop,
        parallel=ParallelConfig(mode=mode),  # type: ignore[arg-type]
        teacher="teacher" if kind == "scd" else None,
    )
    if small:
        config = dataclasses.replace(config, network=UNetConfig(patch=2, width=16, blocks=1))
    data = load_data(config.data)
    if kind != "scd":
        return Trainer(config, folder, dataset=data, progress=False)
    known = dataclasses.replace(recipe.teacher, network=fit_network(config, data).network)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(known.network).eval().requires_grad_(False)
    teacher = Model(
        network,
        known.network,
        known.process,
        data.codec("measured", 0.5),
        known.objective.sampling,
        data.conditioner(network.takes),
    )
    return Trainer(config, folder, teacher=teacher, dataset=data, progress=False)


def work(task: str, recipe: str, kind: str, mode: str, folder: Path) -> None:
    """What one process does: `steps` are timed and printed, `losses` are left in the run folder."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with process_group("cpu", timeout=300):
        trainer = make_trainer(recipe, kind, mode, folder, small=task == "losses")
        if task == "losses":
            trainer.run()
            return
        with freed_memory_kept():  # as in a run
            for _ in range(WARMUP):
                trainer.step()
            began = time.perf_counter()
            for _ in range(STEPS):
                trainer.step()
        if is_first():
            print((time.perf_counter() - began) / STEPS)


# Starting them -----------------------------------------------------------------------------------------------------------


def start(processes: int, threads: int, *task: str) -> str:
    """What the first of several processes of this script prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = []
    for rank in range(processes):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, __file__, "--work", *task]
        group.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    printed = [process.communicate()[0] for process in group]
    if any(process.returncode for process in group):
        raise SystemExit(f"{shlex.join(task)} on {processes} processes failed; see above")
    return printed[0]


def throughput(recipe: str, kind: str, processes: int, repeats: int) -> dict[str, Any]:
    """Seconds a step, in turn in one process of several threads and in several processes of one."""
    seconds: dict[str, list[float]] = {"one": [], "several": []}
    for _ in range(repeats):
        for name, (count, threads) in {"one": (1, processes), "several": (processes, 1)}.items():
            with tempfile.TemporaryDirectory() as folder:
                seconds[name].append(float(start(count, threads, "steps", recipe, kind, "ddp", f"{folder}/run")))
    ratios = [one / several for one, several in zip(*seconds.values(), strict=True)]
    return {"recipe": recipe, "kind": kind, "seconds": seconds, "ratio": median(ratios), "ratios": ratios}


def losses(kind: str, mode: str, processes: int) -> list[float]:
    """The losses of a short run."""
    with tempfile.TemporaryDirectory() as folder:
        start(processes, 1, "losses", "digits", kind, mode, f"{folder}/run")
        return [line["loss"] for line in read_metrics(Path(folder) / "run")]


def equality(kind: str, mode: str, alone: list[float], processes: int) -> dict[str, Any]:
    """How far the losses of several processes are from those of one."""
    several = losses(kind, mode, processes)
    gap = max(abs(a - b) for a, b in zip(alone, several, strict=True))
    return {"kind": kind, "mode": mode, "processes": processes, "steps": len(alone), "largest_difference": gap}


def drawing(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Seconds to draw the noise of a whole batch."""
    generator, seconds = torch.Generator().manual_seed(0), []
    for _ in range(3):
        began = time.perf_counter()
        torch.randn(shape, generator=generator)
        seconds.append(time.perf_counter() - began)
    return {"batch": name, "shape": shape, "seconds": min(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="of the comparison of throughput")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["throughput", "losses", "drawing"], help="leave out the rest")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "scale.json")
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        *what, folder = args.work
        work(*what, Path(folder))
        return
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/scale.py", *sys.argv[1:]]),
        "machine": machine(),
        "bars": [],
    }
    if args.only in (None, "throughput"):
        result["throughput"] = [
            throughput(recipe, kind, args.processes, args.repeats)
            for recipe in ("digits", "mnist")
            for kind in ("diffusion", "scd")
        ]
        for row in result["throughput"]:
            name = f"{row['recipe']}, {row['kind']}"
            what = f"{name}: throughput of {args.processes} processes / one of {args.processes} threads"
            result["bars"].append({"what": what, "measured": row["ratio"], "bar": f">= {BAR}", "met": row["ratio"] >= BAR})
            one, several = (median(row["seconds"][name]) for name in ("one", "several"))
            print(f"{name}: {1000 * one:.0f} ms a step in one process, {1000 * several:.0f} ms in {args.processes}")
    if args.only in (None, "losses"):
        result["losses"] = []
        for kind in ("diffusion", "sct", "scd"):
            alone = losses(kind, "ddp", 1)
            for mode in ("ddp", "fsdp"):
                result["losses"] += [equality(kind, mode, alone, processes) for processes in (2, 4)]
        most = max(row["largest_difference"] for row in result["losses"])
        what = f"largest difference of a loss in {LOSS_STEPS} steps, 2 and 4 processes against 1"
        result["bars"].append({"what": what, "measured": most, "bar": "<= 1e-5", "met": most <= 1e-5})
    if args.only in (None, "drawing"):
        result["drawing"] = [drawing(name, shape) for name, shape in SHAPES.items()]
        for row in result["drawing"]:
            print(f"noise of a batch of {row['batch']} {tuple(row['shape'])}: {1000 * row['seconds']:.0f} ms")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.json, result)
    for bar in result["bars"]:
        print(f"{'met   ' if bar['met'] else 'MISSED'}  {bar['what']:82} {bar['measured']:9.3g}  {bar['bar']}")


if __name__ == "__main__":
    main()
