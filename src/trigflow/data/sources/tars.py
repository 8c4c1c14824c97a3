"""Tar shards in the layout of WebDataset, indexed once and then read at random.

`0001.png` and `0001.cls` are one image and its class (see `trigflow.data.labels`). Where every file lies in its shard is found
by one pass over the headers, so that images can be taken in any order, and a run resumed at any image, as from a zip.
"""

from __future__ import annotations

import os
import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from trigflow.data.cache import Arrays, remembered
from trigflow.data.decode import CorruptImageError
from trigflow.data.sources.files import ENDINGS, MEMBER_LIMIT_BYTES, Files, Names, OpenArchives, file_state, unreadable, visible
from trigflow.runtime.errors import UserError

ENDING = ".tar"
BRACES = re.compile(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", re.DOTALL)
"""A range of numbers in a path, as WebDataset writes shards: `train-{0000..0146}.tar`."""
SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test")
"""Names of the parts of a data set, which are no classes."""
SPLIT_SHARD = re.compile(rf"({'|'.join(SPLITS)})(?![a-z])", re.IGNORECASE)
"""Beginning of the name of a shard of one of them."""
MOST_SHARDS = 1_000_000
ENTRY = np.dtype([("shard", "i4"), ("offset", "i8"), ("size", "i8")])


@dataclass(frozen=True, eq=False)
class TarFiles(Files):
    """The regular files of tar shards; what else a tar can hold, such as links and devices, is left out.

    Attributes:
        names: as in the tars, after the name of the shard: `train-0000.tar/0001.png`.
        shards: paths of the tars.
        entries: where each file lies, of type `ENTRY`, shape `(n,)`.
    """

    shards: tuple[str, ...]
    entries: npt.NDArray[Any]
    archives: OpenArchives = field(default_factory=OpenArchives)

    @classmethod
    def of(cls, where: str, shards: Sequence[str]) -> TarFiles:
        """Read the headers of all shards. Raises a UserError if one cannot be read, or is no uncompressed and whole tar."""
        state = [[path, *file_state(path)] for path in shards]
        found = remembered(["tars", where], state, lambda: _list(shards))
        names = found["names"].tobytes().decode("utf-8", "surrogatepass").split("\0")
        return cls(where, Names(names if len(found["entries"]) else []), tuple(shards), found["entries"])

    def read(self, index: int) -> bytes:
        shard, offset, size = self.entries[index].tolist()
        if size > MEMBER_LIMIT_BYTES:
            raise UserError(
                f"{self.names[index]!r} in {self.where!r} has {size} bytes; expected files up to {MEMBER_LIMIT_BYTES} bytes; "
                "remove it"
            )
        content = self.archives.read(self.shards[shard], offset, size)
        if len(content) != size:
            raise CorruptImageError(self.names[index], "the tar ends inside it")
        return content

    def only(self, indices: Sequence[int]) -> TarFiles:
        return replace(super().only(indices), entries=self.entries[np.asarray(indices, dtype=np.int64)])

    def identity(self) -> list[Any]:
        return [[path, *file_state(path)] for path in self.shards]


def _list(shards: Sequence[str]) -> Arrays:
    """Names of the files, joined by NUL as UTF-8, and where they lie."""
    found: list[tuple[str, tuple[int, int, int]]] = []
    for number, path in enumerate(shards):
        for member in tar_members(path):
            name = posixpath.normpath(member.name.partition("\0")[0]).lstrip("/")  # where other names end, too
            if is_plain(member) and visible([name]):
                found.append((f"{os.path.basename(path)}/{name}", (number, member.offset_data, member.size)))
    found.sort(key=lambda entry: entry[0].split("/"))
    names = "\0".join(name for name, _ in found).encode("utf-8", "surrogatepass")
    return {"names": np.frombuffer(names, np.uint8), "entries": np.array([entry for _, entry in found], dtype=ENTRY)}


def find_shards(path: str) -> list[str] | None:
    """The tars meant by a path: one of them, a folder of them without images or folders, or a range like `train-{00..12}.tar`.

    None if it is none of these. Raises a UserError if a tar of a range is missing, a folder cannot be read, or it holds shards
    of train and val alike.
    """
    if match := BRACES.fullmatch(path):
        begin, first, last, end = match.groups()
        if end.lower().endswith(ENDING) and int(last) - int(first) < MOST_SHARDS:
            numbers = range(int(first), int(last) + 1)
            shards = [f"{begin}{number:0{len(first)}}{end}" for number in numbers]
            missing = [shard for shard in shards if not os.path.isfile(shard)]
            if missing or not shards:
                raise UserError(
                    f"{len(missing)} of the {len(shards)} shards of {path!r} do not exist"
                    f"{f', such as {missing[0]!r}' if missing else ''}; expected all of them; correct the range"
                )
            return shards
    if os.path.isdir(path):
        try:
            names = [name for name in sorted(os.listdir(path)) if not name.startswith(".")]
        except OSError as error:
            raise unreadable(path, error) from error
        shards = [os.path.join(path, name) for name in names if name.lower().endswith(ENDING)]
        other = any(name.lower().endswith(ENDINGS) or os.path.isdir(os.path.join(path, name)) for name in names)
        if other or not shards:
            return None
        parts = {match[1].lower(): name for name in map(os.path.basename, shards) if (match := SPLIT_SHARD.match(name))}
        if len({part[:3] for part in parts}) > 1:  # valid and validation are one, and so are train and training
            raise UserError(
                f"{path!r} holds shards of several parts of a data set, such as {' and '.join(map(repr, parts.values()))}; "
                f"expected those of one; name them: --data '{os.path.join(path, next(iter(parts)))}-{{000..099}}.tar'"
            )
        return shards
    return [path] if path.lower().endswith(ENDING) else None


def tar_members(path: str) -> Iterator[tarfile.TarInfo]:
    """All members of the tar at `path`, from their headers. Raises a UserError if it cannot be read, is compressed, or ends too
    early."""
    try:
        length = os.stat(path).st_size
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                vars(archive)["members"] = []  # it keeps all that it has seen
                if member.offset_data + member.size > length and member.isreg():
                    raise tarfile.ReadError(f"it ends inside {member.name!r}")
                yield member
            _check_end(archive)
    except OSError as error:
        raise unreadable(path, error) from error
    except (tarfile.TarError, EOFError, ValueError, UnicodeError, OverflowError) as error:
        raise UserError(
            f"{path!r} is not a readable tar file ({error}); expected a whole tar that is not compressed; "
            "unpack it (gunzip), or download it again"
        ) from error


def _check_end(archive: tarfile.TarFile) -> None:
    """Where no further header was found there should be zeros or the end of the file; tarfile takes anything for the end."""
    if archive.fileobj is not None:
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"it is damaged at byte {archive.offset}")


def is_plain(member: tarfile.TarInfo) -> bool:
    """Whether this is a regular file whose bytes lie in one piece."""
    return member.isreg() and not member.issparse()
