"""What a checkpoint a minute costs a training run: seconds that training waits, and by which steps are slower meanwhile.

    python benchmarks/checkpoints.py
    python benchmarks/checkpoints.py --repeats 5 --json /tmp/checkpoints.json

Writes benchmarks/results/checkpoints.json. Trains teacher and student of the demo (recipe `digits`, at their full size) in
stretches of so many steps, in turn without a checkpoint, with one that is written beside the steps, and with one that is waited
for. The cost of a checkpoint is by how much longer a stretch takes with it, and the bar is on that as a share of a minute.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
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
from trigflow.networks import build
from trigflow.runtime.files import write_json
from trigflow.runtime.machine import machine
from trigflow.training.config import RunConfig
from trigflow.training.setup import fit_network
from trigflow.training.trainer import Trainer

BAR = 0.02
MINUTE = 60.0
STEPS, WARMUP = 25, 5


def make_trainer(recipe: str, kind: str, folder: Path) -> Trainer:
    """The demo's teacher (`diffusion`) or student (`scd`), whose teacher is not trained, which costs the same."""
    runs = get_recipe(recipe)
    config: RunConfig = runs.teacher if kind == "diffusion" else runs.student
    data = load_data(config.data)
    config = dataclasses.replace(config, teacher="teacher" if kind == "scd" else None)
    if kind == "diffusion":
        return Trainer(config, folder, dataset=data, progress=False)
    known = fit_network(runs.teacher, data)
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
    return Trainer(dataclasses.replace(config, network=known.network), folder, teacher=teacher, dataset=data, progress=False)


def stretch(trainer: Trainer, checkpoint: str) -> tuple[float, float, float]:
    """Seconds of a stretch of steps, those that training waited for a checkpoint, and those until it was whole."""
    waited, whole = 0.0, 0.0
    began = time.perf_counter()
    for step in range(STEPS):
        if checkpoint and not step:
            at = time.perf_counter()
            trainer.save_checkpoint(wait=checkpoint == "waited for")
            waited += time.perf_counter() - at
        busy = trainer.saving.writer.busy
        trainer.step()
        at = time.perf_counter()
        trainer.saving.go_on()
        waited += time.perf_counter() - at
        if busy and not trainer.saving.writer.busy:
            whole = time.perf_counter() - began
    if trainer.saving.writer.busy:
        raise SystemExit(f"a checkpoint takes longer than {STEPS} steps; raise STEPS")
    return time.perf_counter() - began, waited, whole


def cost(recipe: str, kind: str, repeats: int) -> dict[str, Any]:
    """Medians over stretches in turn."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(recipe, kind, Path(folder) / "run")
        for _ in range(WARMUP):
            trainer.step()
        trainer.save_checkpoint()
        size = sum(file.stat().st_size for file in (Path(folder) / "run").glob("checkpoints/*/*.safetensors"))
        seconds: dict[str, list[tuple[float, float, float]]] = {"": [], "beside": [], "waited for": []}
        for _ in range(repeats):
            for checkpoint, found in seconds.items():
                found.append(stretch(trainer, checkpoint))
    plain, beside, waited_for = ([s[0] for s in seconds[name]] for name in seconds)
    extra = median(a - b for a, b in zip(beside, plain, strict=True))
    return {
        "kind": kind,
        "bytes": size,
        "seconds_a_step": median(plain) / STEPS,
        "seconds_blocked": median(s[1] for s in seconds["beside"]),
        "seconds_until_whole": median(s[2] for s in seconds["beside"]),
        "seconds_longer": extra,
        "seconds_longer_when_waited_for": median(a - b for a, b in zip(waited_for, plain, strict=True)),
        "seconds_of_a_stretch": {name or "none": [s[0] for s in found] for name, found in seconds.items()},
        "share_of_a_minute": extra / MINUTE,
        "share_of_a_minute_blocked": median(s[1] for s in seconds["beside"]) / MINUTE,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "checkpoints.json")
    args = parser.parse_args()
    rows = [cost(args.recipe, kind, args.repeats) for kind in ("diffusion", "scd")]
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/checkpoints.py", *sys.argv[1:]]),
        "machine": machine(),
        "rows": rows,
        "bars": [],
    }
    for row in rows:
        print(
            f"{row['kind']}: {row['bytes'] / 1e6:.1f} MB, {1000 * row['seconds_a_step']:.0f} ms a step; a checkpoint blocks "
            f"{1000 * row['seconds_blocked']:.1f} ms, is whole after {1000 * row['seconds_until_whole']:.0f} ms, costs "
            f"{1000 * row['seconds_longer']:.0f} ms in all, {1000 * row['seconds_longer_when_waited_for']:.0f} when waited for"
        )
        for what, name in (("cost", "share_of_a_minute"), ("time blocked", "share_of_a_minute_blocked")):
            line = {"what": f"{row['kind']}: {what} of a checkpoint a minute / a minute", "measured": row[name]}
            result["bars"].append({**line, "bar": f"<= {BAR}", "met": row[name] <= BAR})
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.json, result)
    for bar in result["bars"]:
        print(f"{'met   ' if bar['met'] else 'MISSED'}  {bar['what']:60} {bar['measured']:9.2g}  {bar['bar']}")


if __name__ == "__main__":
    main()
