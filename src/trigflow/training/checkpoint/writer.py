"""Writing checkpoints while training goes on.

Training waits for a copy of its state into memory that is kept for that. A thread writes, hashes and syncs the file of this
process; when all processes have done so, the first one adds `state.json` and gives the folder its name. Threads talk to no
other process: training tells them that all have written, between two steps.
"""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from trigflow.runtime.distributed import gather, is_first, on_first, rank, world_size
from trigflow.runtime.distributed.shards import piece
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import owned, replace_folder, sync_folder
from trigflow.training.checkpoint.folder import FORMAT, retire, seal
from trigflow.training.checkpoint.part import Part, Piece


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time. All of its processes call each method together.

    Args:
        folder: the run folder, which all processes see.
        keep: newest checkpoints that are kept. One is deleted only when a newer one is whole.
        keep_every: those of its multiples are kept too; 0 for none.

    Attributes:
        path: folder of the last checkpoint that was begun.
    """

    def __init__(self, folder: Path, keep: int = 2, keep_every: int = 0) -> None:
        self.root = self.path = folder / "checkpoints"
        self.keep, self.keep_every = keep, keep_every
        self._part: Part | None = None
        self._pieces: dict[str, Piece] = {}
        self._planned_for: Any = None
        self._stage: Literal["idle", "writing", "sealing"] = "idle"
        self._own = contextlib.ExitStack()
        self._thread = threading.Thread()
        self._error = ""
        self._record: dict[str, Any] = {}
        self._state: dict[str, Any] = {}

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._stage != "idle"

    @property
    def ready(self) -> bool:
        """Whether this process has done its part of what is being written, so that `advance` would not wait for it."""
        return self.busy and not self._thread.is_alive()

    def begin(self, iteration: int, tensors: dict[str, Tensor], extra: dict[str, Any]) -> None:
        """Copy the state of a run, and begin to write it. On return the tensors may change. The `extra` JSON goes into
        `state.json`. Raises a UserError when the checkpoint before could not be written."""
        self.finish()
        part = self._prepare(tensors)
        part.fill({name: piece(tensors[name]) for name in self._pieces})
        self._state = {"format": FORMAT, "iteration": iteration, **extra}
        self.path = self.root / f"{iteration:08d}"
        self._temporary = self.root / f".{self.path.name}-progress"
        self._stage, self._record = "writing", {}
        self._start(self._write)

    def advance(self) -> None:
        """Take the next step of writing, when all processes are `ready`. Raises a UserError when the checkpoint could not be
        written, in all processes; nothing is left of it."""
        if self._stage == "writing":
            outcomes = gather((self._error, self._record))
            error = next((error for error, _ in outcomes if error), "")
            if error or world_size() == 1:
                self._end(error)
                return
            self._stage, self._thread = "sealing", threading.Thread()
            if is_first():
                self._record = {name: record for _, records in outcomes for name, record in records.items()}
                self._start(self._seal)
        elif self._stage == "sealing":
            self._end(on_first(lambda: self._error))

    def finish(self) -> None:
        """Wait until what is being written, if anything, is whole; errors as `advance`."""
        while self.busy:
            self.wait()
            self.advance()

    def wait(self) -> None:
        """Wait for this process's own part, whatever the others do."""
        if self._thread.is_alive():
            self._thread.join()

    # Parts ---------------------------------------------------------------------------------------------------------

    def _prepare(self, tensors: dict[str, Tensor]) -> Part:
        """Memory for what this process writes; that of the last checkpoint, where tensors of the same names and shapes were."""
        asked = [(name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in tensors.items()]
        if self._part is None or self._planned_for != asked:
            self._pieces = share_out(tensors)
            self._part = None  # gives its memory back before more is taken
            mine = {name: piece(tensors[name]) for name in self._pieces}
            self._part = Part(mine, self._pieces if world_size() > 1 else None)
            self._planned_for = asked
        return self._part

    def _start(self, work: Callable[[], None]) -> None:
        self._error = ""
        self._thread = threading.Thread(target=self._guarded, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            self._error = error.strerror or str(error)
        except Exception as error:
            self._error = f"{type(error).__name__}: {error}"

    def _write(self) -> None:
        assert self._part is not None
        self._temporary.mkdir(parents=True, exist_ok=True)
        self._own.enter_context(owned(self._temporary))
        several = f"-{rank() + 1:05d}-of-{world_size():05d}" if world_size() > 1 else ""
        name = f"state{several}.safetensors"
        self._record = {name: self._part.write(self._temporary / name)}
        if world_size() == 1:
            self._seal()

    def _seal(self) -> None:
        """Make the checkpoint whole, now that all files of tensors are written."""
        for name, record in self._record.items():
            if not (self._temporary / name).is_file() or (self._temporary / name).stat().st_size != record["bytes"]:
                raise OSError(f"'{name}' of another process is not there")
        text = json.dumps(seal({**self._state, "files": self._record}), indent=2, allow_nan=False)
        with (self._temporary / "state.json").open("wb") as file:
            file.write(text.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self._temporary)
        replace_folder(self.path, self._temporary)
        sync_folder(self.root)
        retire(self.root.parent, self.keep, self.keep_every)

    def _end(self, error: str) -> None:
        self._stage = "idle"
        self._own.close()
        if error:
            on_first(lambda: shutil.rmtree(self._temporary, ignore_errors=True))
            reason = " ".join(error.split())
            raise UserError(
                f"cannot write checkpoint '{self.path}' ({reason}); expected a folder that all processes can write to, with "
                "space left; make room, and go on with --resume"
            )


def share_out(tensors: dict[str, Tensor]) -> dict[str, Piece]:
    """Which of all pieces of these tensors this process writes; each is written once, and all have about as much to do.

    Planned by `torch.distributed.checkpoint`.
    """
    if world_size() == 1:
        return {name: Piece((0,) * tensor.dim(), tuple(tensor.shape)) for name, tensor in tensors.items()}
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(tensors, is_coordinator=is_first())
    plans = gather(planner.create_local_plan())
    mine = on_first(lambda: planner.create_global_plan(plans)[0])[rank()]
    chunks = {item.index.fqn: item.tensor_data.chunk for item in mine.items if item.tensor_data is not None}
    return {name: Piece(tuple(chunk.offsets), tuple(chunk.sizes)) for name, chunk in chunks.items()}
