"""Checkpoints: everything a run needs to go on as if it had never stopped.

    RUN/checkpoints/<iteration>/state.safetensors               weights, averages and optimizer moments of a single process
    RUN/checkpoints/<iteration>/state-00001-of-00004.safetensors   or those that one of several processes wrote
    RUN/checkpoints/<iteration>/state.json                      counters, and size and SHA-256 of every other file

A checkpoint is written under a temporary name and renamed, `state.json` last, so it is whole or absent. Nothing in it depends
on the number of processes that wrote it. Random streams and data order are functions of (seed, iteration) and need no state.

* `state`: which tensors a run consists of, and how they get back into modules and optimizers.
* `part`: one file of tensors, written from memory that has its layout.
* `stored`: the tensors of a checkpoint, read in whole or in part.
* `folder`: the checkpoints of a run: which there are, whether they are sound, which are kept.
* `writer`: saves while training goes on.
"""

from trigflow.training.checkpoint.folder import (
    COUNTERS,
    FORMAT,
    DamagedCheckpointError,
    check_checkpoint,
    clear_unfinished,
    list_checkpoints,
    open_checkpoint,
    set_aside,
)
from trigflow.training.checkpoint.state import load_checkpoint, tensors_of
from trigflow.training.checkpoint.stored import Stored
from trigflow.training.checkpoint.writer import CheckpointWriter

__all__ = [
    "COUNTERS",
    "FORMAT",
    "CheckpointWriter",
    "DamagedCheckpointError",
    "Stored",
    "check_checkpoint",
    "clear_unfinished",
    "list_checkpoints",
    "load_checkpoint",
    "open_checkpoint",
    "set_aside",
    "tensors_of",
]
