"""Runs that are made by one process and by several, to be compared."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.tiny import change, digits, tiny_config, tiny_trainer, untrained_teacher
from trigflow.networks import ConditioningConfig, EDM2Config
from trigflow.runtime.distributed import is_first, rank, world_size
from trigflow.training import compiled
from trigflow.training.batch import Batch
from trigflow.training.config import RunConfig
from trigflow.training.parallel import blocks_of
from trigflow.training.saving import Resume
from trigflow.training.trainer import Trainer

Changes = dict[str, Any]

FSDP: Changes = {"parallel.mode": "fsdp"}
SHORT: Changes = {"loop.iterations": 3, "loop.log_every": 1, "loop.batch_size": 8}
FIVE = SHORT | {"loop.iterations": 5}
LONG = SHORT | {"loop.iterations": 20}
SCT: Changes = {"objective.kind": "sct", "optimizer.lr": 1e-3}
SCD = SCT | {"objective.kind": "scd"}
VSD = SCD | {
    "objective.kind": "scd-vsd",
    "objective.fake_updates": 2,
    "optimizer.clip": 0.5,
    "ema.snapshot_every": 3,
    "loop.sample_every": 3,
    "loop.accumulate": 2,
}
EDM2: Changes = {
    "network": EDM2Config(width=8, mult=(1, 2), blocks=1, attention=(4,), conditioning=ConditioningConfig(width=8))
}
GUIDED = SCD | {"objective.guidance_max": 2.0, "objective.guidance_interval": (5.0, 80.0), "negative": "negative"}

CASES: dict[str, Changes] = {
    "teacher": LONG,
    "sct": LONG | SCT,
    "scd": LONG | SCD,
    "vsd": SHORT | VSD,
    "vsd, recomputed": SHORT | VSD | {"parallel.recompute": True},
    "muon": SHORT | {"optimizer.name": "muon", "network.width": 32, "optimizer.weight_decay": 0.1},
    "edm2": SHORT | SCT | EDM2,
    "guided": SHORT | GUIDED,
    "two shards": SHORT | SCD | {"parallel.shards": 2},
    "bf16": SHORT | SCT | {"loop.precision": "bf16"},
    "gathered in bf16": SHORT | SCT | {"loop.precision": "bf16", "parallel.dtype": "bf16"},
    "instruments": SHORT | SCT | {"loop.instruments": True},
    "poisoned": FIVE,
    "stopped": FIVE,
}


def make_trainer(name: str, folder: Path, changes: Changes, *, resume: Resume = False) -> Trainer:
    """The trainer of a case, in FOLDER."""
    given = CASES[name] | changes
    if not given.get("objective.kind", "diffusion").startswith("scd"):
        return tiny_trainer(folder, given, resume=resume)
    teacher = untrained_teacher()
    if "negative" not in given:
        return tiny_trainer(folder, given, teacher=teacher, resume=resume)
    config: RunConfig = change(tiny_config(given), {"teacher": "teacher", "network": teacher.spec})
    return Trainer(
        config, folder, teacher=teacher, negative=untrained_teacher(1), dataset=digits(), resume=resume, progress=False
    )


def run_case(name: str, folder: Path, changes: Changes, *, stop: bool = True) -> None:
    """Run a case into FOLDER.

    In "poisoned" one sample of the third step is not finite. In "stopped" the last process gets Ctrl-C in the third step.
    """
    compiled.BACKEND = "eager"  # which traces, and runs the graphs as they are
    trainer = make_trainer(name, folder, changes)
    draw = trainer._batch

    def spoilt(indices: Tensor, generator: torch.Generator) -> Batch:
        batch = draw(indices, generator)
        last = rank() == world_size() - 1
        if name == "poisoned" and trainer.iteration == 2 and last:
            batch["x0"][-1] = torch.nan
        if name == "stopped" and trainer.iteration == 2 and last and stop:
            os.kill(os.getpid(), signal.SIGINT)
        return batch

    trainer._batch = spoilt  # type: ignore[method-assign]
    try:
        trainer.run()
    except KeyboardInterrupt:
        assert name == "stopped"
    if trainer.config.loop.compile == "on" and is_first():
        note_graphs(trainer, folder.parent / "graphs")


def note_graphs(trainer: Trainer, path: Path) -> None:
    """Add a line: how many losses and blocks of a run were compiled, and how many kinds of their calls ran as they are."""
    losses = list(trainer.losses.compiled.values())
    blocks = [vars(block)["compiled"] for block in blocks_of(trainer.network) if "compiled" in vars(block)]
    parts = [*losses, *blocks, *(block.tangents for block in blocks if block.tangents)]
    plain = sum(runs.count(None) for part in parts for runs in part.kinds.values())
    with path.open("a") as file:
        file.write(f"{len(losses)} {len(blocks)} {plain}\n")
