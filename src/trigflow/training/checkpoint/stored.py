"""The tensors of a checkpoint, in whichever pieces they were written."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trigflow.runtime.distributed.shards import from_piece, is_sharded, place_of
from trigflow.runtime.errors import UserError
from trigflow.runtime.tensors import DTYPES
from trigflow.training.checkpoint.part import ORIGIN, ORIGINS, Piece

FORMATS = {name: dtype for dtype, name in DTYPES.items()}


class Stored(contextlib.ExitStack):
    """The tensors of one checkpoint, read as they are asked for; a context manager that closes the files.

    Attributes:
        shapes: shape of each tensor as a whole, by name.

    Raises:
        UserError: when a file is missing or cannot be read.
    """

    def __init__(self, path: Path, files: list[str]) -> None:
        super().__init__()
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[tuple[Any, Piece]]] = {}
        try:
            for name in files:
                self._open(path / name)
        except BaseException:
            self.close()
            raise

    def below(self, prefix: str) -> dict[str, str]:
        """Full names of the tensors `prefix.<rest>` by the rest of their names."""
        start = f"{prefix}."
        return {name[len(start) :]: name for name in self.shapes if name.startswith(start)}

    def read(self, name: str, piece: Piece | None = None) -> Tensor:
        """A tensor, or this piece of it, in main memory. Raises a UserError when it cannot be read."""
        wanted = Piece((0,) * len(self.shapes[name]), self.shapes[name]) if piece is None else piece
        with _reading(self.path):
            for file, found in self._pieces[name]:
                if found == wanted:
                    return file.get_tensor(name)  # type: ignore[no-any-return]
            first = self._pieces[name][0][0].get_slice(name)
            result = torch.empty(wanted.shape, dtype=FORMATS[first.get_dtype()])
            for file, found in self._pieces[name]:
                shared = list(_overlap(wanted, found))
                if all(low < high for low, high in shared):
                    there, here = (
                        tuple(slice(low - at, high - at) for (low, high), at in zip(shared, of.origin, strict=True))
                        for of in (found, wanted)
                    )
                    result[here] = file.get_slice(name)[there]
        return result

    def read_like(self, name: str, model: Tensor) -> Tensor:
        """A tensor held in pieces as `model` is, of which only this process's piece is read."""
        if not is_sharded(model):
            return self.read(name)
        return from_piece(self.read(name, Piece(*place_of(model))), model)

    def read_all(self, prefix: str) -> dict[str, Tensor]:
        """The whole tensors `prefix.<rest>` by the rest of their names."""
        return {rest: self.read(name) for rest, name in self.below(prefix).items()}

    def _open(self, path: Path) -> None:
        with _reading(path):
            file = self.enter_context(safe_open(path, framework="pt"))
            origins = json.loads((file.metadata() or {}).get(ORIGINS, "{}"))
            for name in file.keys():  # noqa: SIM118 - not a dict
                shape = tuple(file.get_slice(name).get_shape())
                origin = tuple(origins[name][ORIGIN]) if name in origins else (0,) * len(shape)
                piece = Piece(origin, shape)
                ends = tuple(at + size for at, size in zip(origin, shape, strict=True))
                known = self.shapes.get(name, ends)
                self.shapes[name] = tuple(max(pair) for pair in zip(known, ends, strict=True))
                if math.prod(shape) or name not in self._pieces:
                    self._pieces.setdefault(name, []).append((file, piece))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise UserError(
            f"checkpoint '{path}' {reason}; expected a whole safetensors file; restore it, or delete this checkpoint to resume "
            "from the one before"
        ) from None


def _overlap(a: Piece, b: Piece) -> Iterator[tuple[int, int]]:
    """First index and the one after the last that two pieces share, dimension by dimension."""
    for (i, n), (j, m) in zip(zip(a.origin, a.shape, strict=True), zip(b.origin, b.shape, strict=True), strict=True):
        yield max(i, j), min(i + n, j + m)
