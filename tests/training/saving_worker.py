"""One of the processes of test_distributed_saving.py, see `group.py`; its arguments are FOLDER TASKS.

TASKS is JSON, a list of task, name and mode of the weights. Each leaves in FOLDER/NAME-RANK.safetensors what the trainer holds,
put together from all processes.
"""

from __future__ import annotations

import faulthandler
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from training.distributed_cases import make_trainer
from trigflow.runtime.distributed import is_first, on_first, process_group, rank
from trigflow.runtime.distributed.shards import whole
from trigflow.training.checkpoint import list_checkpoints, tensors_of
from trigflow.training.checkpoint.part import Part
from trigflow.training.trainer import Trainer

CHANGES: dict[str, Any] = {"ema.snapshot_every": 50, "loop.batch_size": 8}
"""To a teacher: several averages."""


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    tensors = tensors_of({**trainer.modules, **trainer.ema.modules}, trainer.optimizers)
    return {name: whole(value.detach()).clone().contiguous() for name, value in tensors.items()}


def save(folder: Path, mode: str) -> Trainer:
    """Two steps, a checkpoint beside the next ones, and what was at that moment."""
    trainer = make_trainer("teacher", folder, {**CHANGES, "parallel.mode": mode})
    trainer.step()
    trainer.step()
    trainer.save_checkpoint(wait=False)
    return trainer


def go_on(trainer: Trainer, folder: Path) -> None:
    """Steps until the checkpoint is whole."""
    while trainer.saving.writer.busy:
        trainer.saving.writer.wait()
        trainer.step()
        trainer.saving.go_on()
    assert on_first(lambda: len(list_checkpoints(folder))) == 1


def fill_disk(folder: Path) -> Trainer:
    """A run in which the last process cannot write the first checkpoint."""
    write = Part.write

    def full(part: Part, path: Path) -> dict[str, object]:
        if rank() and "00000002" in path.parent.name:
            path.write_bytes(part.head[:50])
            raise OSError(28, "No space left on device")
        return write(part, path)

    Part.write = full  # type: ignore[method-assign]
    trainer = make_trainer("teacher", folder, {"loop.iterations": 5, "loop.checkpoint_every": 2, "loop.keep": 9})
    trainer.run()
    Part.write = write  # type: ignore[method-assign]
    return trainer


def damage(folder: Path) -> Trainer:
    """A run resumed where one of the files of its newest checkpoint has been changed."""
    changes: dict[str, Any] = {"loop.iterations": 2, "loop.checkpoint_every": 1}
    make_trainer("teacher", folder, changes).run()
    if is_first():
        file = folder / "checkpoints" / "00000002" / "state-00002-of-00002.safetensors"
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    return make_trainer("teacher", folder, changes, resume="auto")


def main() -> None:
    root = Path(sys.argv[1])
    faulthandler.dump_traceback_later(240, exit=True)  # a process that waits for ever says where
    torch.set_num_threads(1)
    with process_group("cpu", timeout=200):
        for task, name, mode in json.loads(sys.argv[2]):
            folder = root / name
            if task == "save":
                trainer = save(folder, mode)
                state = state_of(trainer)
                go_on(trainer, folder)
            elif task.startswith("resume "):
                on_first(lambda task=task, folder=folder: shutil.copytree(root / task[7:], folder) and None)  # type: ignore[misc]
                state = state_of(make_trainer("teacher", folder, {**CHANGES, "parallel.mode": mode}, resume=True))
            else:
                state = state_of(fill_disk(folder) if task == "fill" else damage(folder))
            save_file(state, root / f"{name}-{rank()}.safetensors")
            if is_first():
                print(f"done: {name}", flush=True)
