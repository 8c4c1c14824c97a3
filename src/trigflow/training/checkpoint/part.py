"""One file of a checkpoint: the tensors, or pieces of tensors, that one process writes.

A safetensors file is the length of a header, the header (JSON: number format, shape and place of each tensor), and the tensors
one after another. Memory of the same layout is kept from one checkpoint to the next, so that training waits for nothing but a
copy, and what is written later is a single block of bytes.

Source of the format: https://huggingface.co/docs/safetensors. Where a tensor is held in pieces, the header says where each
begins as `HuggingFaceStorageWriter` of `torch.distributed.checkpoint` does, whose reader can read these files.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Number formats by their names in a header."""
ORIGINS, ORIGIN = "DCP_SHARDING_INFO", "saved_offsets"
"""Entries of the header that say where a piece begins in its tensor."""
BLOCK = 8 << 20
"""Bytes that are hashed and written at a time."""


@dataclass(frozen=True)
class Piece:
    """A block of a tensor.

    Attributes:
        origin: index of its first element in the tensor.
        shape: its own shape.
    """

    origin: tuple[int, ...]
    shape: tuple[int, ...]


class Part:
    """Memory for a file of tensors.

    Args:
        tensors: what will be written, by name; only formats, shapes and devices matter here.
        pieces: which pieces of larger tensors these are, where they are not whole.
    """

    def __init__(self, tensors: dict[str, Tensor], pieces: dict[str, Piece] | None = None) -> None:
        self.names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # every format aligned
        header: dict[str, object] = {}
        if pieces:
            origins = json.dumps({name: {ORIGIN: list(pieces[name].origin)} for name in self.names})
            header["__metadata__"] = {ORIGINS: origins}
        end = 0
        for name in self.names:
            tensor = tensors[name]
            begin, end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        self.head = struct.pack("<Q", len(encoded)) + encoded
        self.pinned = any(tensor.is_cuda for tensor in tensors.values())
        self.content = torch.empty(end, dtype=torch.uint8, pin_memory=self.pinned)
        self.views, begin = [], 0
        for name in self.names:
            tensor = tensors[name]
            size = tensor.numel() * tensor.element_size()
            self.views.append(self.content[begin : begin + size].view(tensor.dtype).view(tensor.shape))
            begin += size

    @torch.no_grad()
    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Copy the tensors as they are now; on return they may change."""
        if self.views:
            torch._foreach_copy_(self.views, [tensors[name].detach() for name in self.names], non_blocking=self.pinned)
        if self.pinned:
            torch.cuda.current_stream().synchronize()

    def write(self, path: Path) -> dict[str, object]:
        """Write the file, onto the disk itself, and return its record: `bytes` and `sha256`.

        Raises:
            OSError: when it cannot be written.
        """
        digest = hashlib.sha256()
        content = memoryview(self.content.numpy())  # type: ignore[arg-type]
        with path.open("wb", buffering=0) as file:
            for block in [memoryview(self.head), *(content[at : at + BLOCK] for at in range(0, len(content), BLOCK))]:
                digest.update(block)
                while block:
                    block = block[file.write(block) :]
            os.fsync(file.fileno())
        return {"bytes": len(self.head) + len(content), "sha256": digest.hexdigest()}


def digest_of(path: Path) -> str:
    """SHA-256 of a file's content.

    Raises:
        OSError: when it cannot be read.
    """
    digest, block = hashlib.sha256(), bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()
