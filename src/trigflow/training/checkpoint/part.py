"""One file of a checkpoint: the tensors, or pieces of tensors, that one process writes.

Memory of the layout of the file is kept from one checkpoint to the next, so that training waits for nothing but a copy, and
what is written later is a single block of bytes. Where a tensor is held in pieces, the header says where each begins as
`HuggingFaceStorageWriter` of `torch.distributed.checkpoint` does, whose reader can read these files.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trigflow.runtime.tensors import content, layout

ORIGINS, ORIGIN = "DCP_SHARDING_INFO", "saved_offsets"
"""Entries of the header that say where a piece begins in its tensor."""
BLOCK = 8 << 20
"""Bytes that are hashed and written at a time."""


@dataclass(frozen=True)
class Piece:
    """A block of a tensor. The origin is the index of its first element in the tensor."""

    origin: tuple[int, ...]
    shape: tuple[int, ...]


class Part:
    """Memory for a file of tensors. Of the tensors only formats, shapes and devices matter; `pieces` says which pieces of
    larger ones they are."""

    def __init__(self, tensors: dict[str, Tensor], pieces: dict[str, Piece] | None = None) -> None:
        origins = {name: {ORIGIN: list(piece.origin)} for name, piece in sorted((pieces or {}).items())}
        self.head, self.names = layout(tensors, {ORIGINS: json.dumps(origins)} if origins else None)
        self.devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        sizes = [tensors[name].numel() * tensors[name].element_size() for name in self.names]
        self.content = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=bool(self.devices))
        parts = zip(self.names, self.content.split(sizes), strict=True)
        self.views = [part.view(tensors[name].dtype).view(tensors[name].shape) for name, part in parts]

    @torch.no_grad()
    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Copy the tensors as they are now; on return they may change."""
        if self.views:
            torch._foreach_copy_(self.views, [tensors[name].detach() for name in self.names], non_blocking=bool(self.devices))
        for device in self.devices:
            torch.cuda.current_stream(device).synchronize()

    def write(self, path: Path) -> dict[str, object]:
        """Write the file, onto the disk itself, and return its record: `bytes` and `sha256`. Raises an OSError when it cannot
        be written."""
        digest = hashlib.sha256()
        numbers = content(self.content)
        with path.open("wb", buffering=0) as file:
            for block in [memoryview(self.head), *(numbers[at : at + BLOCK] for at in range(0, len(numbers), BLOCK))]:
                digest.update(block)
                while block:
                    block = block[file.write(block) :]
            os.fsync(file.fileno())
        return {"bytes": len(self.head) + len(numbers), "sha256": digest.hexdigest()}


def digest_of(path: Path) -> str:
    """SHA-256 of a file's content. Raises an OSError when it cannot be read."""
    digest, block = hashlib.sha256(), bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()
