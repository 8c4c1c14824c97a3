"""Runs whose numbers go wrong, made by one process and by two, to be compared.

`main` is one of the two, see `group.py`; its argument is a folder, which gets a run folder for each case.
"""

from __future__ import annotations

import faulthandler
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.tiny import tiny_trainer, untrained_teacher
from trigflow.runtime.distributed import process_group, rank, world_size
from trigflow.runtime.distributed.shards import piece
from trigflow.training.trainer import Trainer

Changes = dict[str, Any]
Fault = Callable[[Trainer], None]

SHORT: Changes = {"loop.iterations": 6, "loop.log_every": 1, "loop.checkpoint_every": 2, "guard.patience": 2}
FP16 = SHORT | {"loop.precision": "fp16"}
CASES: dict[str, Changes] = {
    "clipped": SHORT | {"optimizer.clip": 0.05},
    "float16": FP16 | {"optimizer.clip": 0.05},
    "float16 vsd": FP16 | {"objective.kind": "scd-vsd", "loop.accumulate": 2, "loop.iterations": 4},
    "overflow": FP16,
    "row of steps": SHORT,
    "average": SHORT,
}
FSDP: Changes = {"parallel.mode": "fsdp"}
TWO: list[tuple[str, Changes]] = [*((name, FSDP) for name in CASES), *((name, {}) for name in ("overflow", "row of steps"))]


def last_process() -> bool:
    return rank() == world_size() - 1


def spoil_gradient(trainer: Trainer) -> None:
    """In one process, the gradient of what the network returns in the third step is infinite."""

    def spoil(module: nn.Module, args: Any, out: Tensor) -> None:
        if last_process() and trainer.iteration == 2 and out.requires_grad:
            out.register_hook(lambda gradient: gradient * math.inf)

    trainer.network.register_forward_hook(spoil)


def spoil_steps(trainer: Trainer) -> None:
    """In one process, what the network returns in the fourth and fifth step is no number, until the run has gone back."""

    def spoil(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        wrong = last_process() and trainer.iteration in (3, 4) and not trainer.guard.rollbacks
        return out * math.nan if wrong else out

    trainer.network.register_forward_hook(spoil)


def spoil_average(trainer: Trainer) -> None:
    """After the third step, one number of the average, which with sharded weights one process has."""
    step = trainer.step

    def spoilt() -> Any:
        result = step()
        if trainer.iteration == 3 and not trainer.guard.rollbacks:
            with torch.no_grad():
                weight = piece(next(iter(trainer.ema.network.parameters())))
                if last_process() and weight.numel():
                    weight.view(-1)[-1] = math.nan
        return result

    trainer.step = spoilt  # type: ignore[method-assign]


FAULTS: dict[str, Fault] = {"overflow": spoil_gradient, "row of steps": spoil_steps, "average": spoil_average}


def run_case(name: str, folder: Path, changes: Changes) -> Trainer:
    given = CASES[name] | changes
    teacher = untrained_teacher() if given.get("objective.kind", "").startswith("scd") else None
    trainer = tiny_trainer(folder, given, teacher=teacher)
    FAULTS.get(name, lambda trainer: None)(trainer)
    trainer.run()
    return trainer


def folder_of(name: str, changes: Changes) -> str:
    return f"{name}, fsdp" if changes else name


def main() -> None:
    folder = Path(sys.argv[1])
    faulthandler.dump_traceback_later(300, exit=True)
    torch.set_num_threads(1)
    with process_group("cpu", timeout=200):
        for name, changes in TWO:
            run_case(name, folder / folder_of(name, changes), changes)
