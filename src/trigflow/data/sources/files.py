"""The files of a folder, a zip or tar shards, seen alike: sorted names and a way to read each. Nothing is ever written.

A `Files` can be pickled, or forked, into worker processes. No open file is shared between them: each opens what it reads for
itself, and reads at given places, so that nobody's position in a file is moved by somebody else.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar, overload

import numpy as np

from trigflow.runtime.errors import UserError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
"""Of images."""
MEMBER_LIMIT_BYTES = 1 << 29
"""Largest file read out of a zip or tar; a small zip can claim to unpack to any size."""
MOST_OPEN = 64
"""Archives that one process keeps open."""

F = TypeVar("F", bound="Files")


class Names(Sequence[str]):
    """Many names in one block of bytes: quickly sent to a worker process, and not copied page by page when forked."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogatepass") for name in names]
        self._text = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[str]:
        ends = self._ends.tolist()
        return (self._text[begin:end].decode("utf-8", "surrogatepass") for begin, end in pairwise(ends))

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self._text[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass")


@dataclass(frozen=True, eq=False)
class Files:
    """What a folder, a zip or tar shards hold.

    Attributes:
        where: its path, for messages.
        names: relative paths with `/` between parts, sorted part by part; hidden files are not among them.
    """

    where: str
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        """The bytes of the file of this number.

        Raises:
            UserError: if it may not be read.
            CorruptImageError: if an archive is damaged there.
        """
        raise NotImplementedError

    def images(self) -> Sequence[int]:
        """Numbers of the files that are images, by the endings of their names."""
        return [index for index, name in enumerate(self.names) if name.lower().endswith(ENDINGS)]

    def find(self, name: str) -> int | None:
        """Number of the file of this name, or None."""
        parts = name.split("/")
        index = bisect_left(self.names, parts, key=lambda other: other.split("/"))
        return index if index < len(self) and self.names[index] == name else None

    def only(self: F, indices: Sequence[int]) -> F:
        """These files alone, in this order."""
        return replace(self, names=Names(self.names[index] for index in indices))

    def identity(self) -> list[Any]:
        """Something plain that differs when names or contents do: names, sizes and times of the last change."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class FolderFiles(Files):
    """The files below a folder; links are followed, though never back into a folder they are in."""

    @classmethod
    def of(cls, path: str) -> FolderFiles:
        """List the folder. Raises a UserError if it, or a folder in it, cannot be read."""
        try:
            return cls(path, Names(visible(_walk(path))))
        except OSError as error:
            raise unreadable(error.filename or path, error) from error

    def read(self, index: int) -> bytes:
        return read_file(os.path.join(self.where, self.names[index]))

    def identity(self) -> list[Any]:
        return [[name, *file_state(os.path.join(self.where, name))] for name in self.names]


class OpenArchives:
    """Reads bytes at given places of large files, each kept open by the process that reads it, the latest of them only."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._open: dict[str, _Open] = {}

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`; fewer where the file ends before. Raises a UserError if the file cannot be
        read."""
        try:
            file = self._file(path)
            parts = []
            while length > 0 and (part := os.pread(file.descriptor, length, offset)):
                parts.append(part)
                offset, length = offset + len(part), length - len(part)
            return parts[0] if len(parts) == 1 else b"".join(parts)
        except OSError as error:
            raise unreadable(path, error) from error

    def _file(self, path: str) -> _Open:
        if self._process != os.getpid():
            self._process, self._open = os.getpid(), {}
        file = self._open.pop(path, None) or _Open(path)
        self._open[path] = file  # at the end: the first is the one that was not read for longest
        for other in list(self._open)[:-MOST_OPEN]:
            self._open.pop(other, None)
        return file

    def __reduce__(self) -> tuple[type[OpenArchives], tuple[()]]:
        return OpenArchives, ()


class _Open:
    """A file descriptor that is closed with the last reference to it."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def visible(names: Iterable[str]) -> list[str]:
    """Sorted part by part, without what file managers leave behind: parts that start with a dot, and `__MACOSX`."""
    parts = (name.split("/") for name in names)
    kept = [p for p in parts if not any(part.startswith(".") or part == "__MACOSX" for part in p)]
    return ["/".join(p) for p in sorted(kept)]


def read_file(path: str) -> bytes:
    """The bytes of a file. Raises a UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise unreadable(path, error) from error


def file_state(path: str) -> list[int]:
    """Size and time of the last change of a file. Raises a UserError if it cannot be looked at."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from error
    return [found.st_size, found.st_mtime_ns]


def unreadable(path: str, error: OSError) -> UserError:
    """The error to raise for a file that the system does not let us read."""
    return UserError(
        f"cannot read {path!r} ({error.strerror or error}); expected a file or folder that this user may read; "
        "check the path and its permissions"
    )


def _walk(folder: str, prefix: str = "", parents: tuple[str, ...] = ()) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in parents:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/", (*parents, real))
            elif entry.is_file() or entry.is_symlink():
                yield prefix + entry.name
