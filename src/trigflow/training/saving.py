"""The checkpoints of a run in training: when they are due, how they are written beside it, how it comes back to them."""

import functools
import time
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from trigflow.runtime.distributed import is_first, on_first
from trigflow.runtime.errors import UserError
from trigflow.runtime.interrupt import uninterrupted
from trigflow.training.checkpoint import (
    CheckpointWriter,
    DamagedCheckpointError,
    list_checkpoints,
    load_checkpoint,
    set_aside,
    tensors_of,
)
from trigflow.training.config import LoopConfig
from trigflow.training.log import warn

Resume = bool | Literal["auto"]
"""Whether a run goes on from its newest checkpoint, or from its newest sound one."""
RESUME: dict[str, Resume] = {"no": False, "yes": True, "auto": "auto"}
"""What the command line calls that."""


class Saving:
    """Saves a run and restores it. All of its processes call each method together. `modules` have the weights and `optimizers`
    the moments, by name."""

    def __init__(
        self, folder: Path, config: LoopConfig, modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]
    ) -> None:
        self.folder = folder
        self.config = config
        self.modules = modules
        self.optimizers = optimizers
        self.writer = CheckpointWriter(folder, config.keep, config.keep_every)
        self._saved_at = time.monotonic()
        self._told: dict[str, float] = {}

    def tell(self) -> dict[str, float]:
        """What the processes have to agree on after each step, as numbers whose means go to `hear`."""
        minutes = self.config.checkpoint_minutes
        passed = minutes > 0 and time.monotonic() >= self._saved_at + 60 * minutes
        due = passed and is_first() and not self.writer.busy  # the clock of the first process counts
        return {"due": float(due), "written": float(self.writer.ready)}

    def hear(self, means: dict[str, float]) -> None:
        """Take in the means over the processes of what they tell."""
        self._told = means

    def due(self, iteration: int) -> bool:
        """Whether a checkpoint is to be written after this many iterations."""
        every = (self.config.checkpoint_every, self.config.keep_every)
        return self._told.get("due", 0) > 0 or any(n and iteration % n == 0 for n in every)

    def go_on(self) -> None:
        """The next step of what is being written, once every process is ready for it."""
        if self._told.get("written") == 1 and self.writer.busy:
            self._warned(self.writer.advance)

    def finish(self) -> None:
        """Wait until what is being written, if anything, is whole."""
        self._warned(self.writer.finish)

    def save(self, iteration: int, extra: dict[str, Any], *, wait: bool = True) -> None:
        """Write a checkpoint of the run after this many steps; the `extra` JSON is saved beside the tensors.

        With `wait` until it is whole; a UserError is raised when it cannot be written. Otherwise only a copy is waited for,
        `go_on` sees to the rest, and what goes wrong is only warned of.
        """
        self.finish()
        with uninterrupted():
            self.writer.begin(iteration, tensors_of(self.modules, self.optimizers), extra)
            self._saved_at = time.monotonic()
        if wait:
            self.writer.finish()

    def restore(self, *, strict: bool = False) -> dict[str, Any] | None:
        """Load the newest sound checkpoint; returns what was saved beside the tensors, or None where there is none. Arguments
        and errors are those of `RunParts.restore`."""
        self.finish()
        for path in reversed(on_first(lambda: list_checkpoints(self.folder))):
            try:
                return load_checkpoint(path, self.modules, self.optimizers)
            except DamagedCheckpointError as error:
                if strict:
                    raise
                aside = on_first(functools.partial(set_aside, path))
                warn(f"{error}; set aside as '{aside.name}', and the one before is used")
        return None

    def _warned(self, action: Any) -> None:
        """Do this; a checkpoint that cannot be written is not the end of the run."""
        try:
            action()
        except UserError as error:
            warn(str(error))
