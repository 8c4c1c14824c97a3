"""Files inside a zip, read where they are, as in the zips of EDM and StyleGAN, whose images are stored uncompressed."""

from __future__ import annotations

import os
import posixpath
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from trigflow.data.decode import CorruptImageError
from trigflow.data.sources.files import MEMBER_LIMIT_BYTES, Files, Names, OpenArchives, file_state, unreadable, visible
from trigflow.runtime.errors import UserError

SIGNATURE = b"PK\3\4"
LOCAL_HEADER = struct.Struct("<26xHH")
"""What stands before the bytes of a file in a zip, with the lengths of the name and of the extra field that follow it."""
BESIDE = 512
"""Bytes read along with a file: enough for its local header, name and extra field."""
ENTRY = np.dtype([("offset", "i8"), ("packed", "i8"), ("size", "i8"), ("crc", "u4"), ("method", "u2"), ("encrypted", "?")])


@dataclass(frozen=True, eq=False)
class ZipFiles(Files):
    """The files of a zip.

    Attributes:
        entries: where each lies and how it is packed, of type `ENTRY`, shape `(n,)`.
    """

    entries: npt.NDArray[Any]
    archives: OpenArchives = field(default_factory=OpenArchives)

    @classmethod
    def of(cls, path: str) -> ZipFiles:
        """Read the directory of the zip. Raises a UserError if it cannot be read, or is no zip."""
        with open_zip(path) as archive:
            members = {member_name(info): info for info in archive.infolist() if not info.is_dir()}
        names = visible(members)
        return cls(path, Names(names), _entries(path, (members[name] for name in names)))

    def read(self, index: int) -> bytes:
        entry = self.entries[index]
        packed, size = int(entry["packed"]), int(entry["size"])
        self._check(index, entry["encrypted"], max(packed, size), entry["method"])
        begin, data = self._span(index, packed)
        content = data[begin : begin + packed]
        if entry["method"] == zipfile.ZIP_DEFLATED:
            content = _inflate(content, size)
        if len(content) != size or zlib.crc32(content) != entry["crc"]:
            raise CorruptImageError(self.names[index], "its bytes in the zip are damaged")
        return content

    def only(self, indices: Sequence[int]) -> ZipFiles:
        return replace(super().only(indices), entries=self.entries[np.asarray(indices, dtype=np.int64)])

    def identity(self) -> list[Any]:
        return [self.where, *file_state(self.where)]

    def stored_spans(self) -> list[tuple[int, int]] | None:
        """Where the bytes of all these files lie, as (offset, length) of each; None if one is compressed or not whole."""
        if bool((self.entries["encrypted"] | (self.entries["method"] != zipfile.ZIP_STORED)).any()):
            return None
        try:
            begins = [self._span(index, 0)[0] for index in range(len(self))]
        except CorruptImageError:
            return None
        places = self.entries["offset"] + begins
        return list(zip(places.tolist(), self.entries["size"].tolist(), strict=True))

    def _span(self, index: int, packed: int) -> tuple[int, bytes]:
        """Bytes of the zip around a file of `packed` bytes, and where in them it begins."""
        offset = int(self.entries["offset"][index])
        data = self.archives.read(self.where, offset, BESIDE + packed)
        if not data.startswith(SIGNATURE) or len(data) < LOCAL_HEADER.size:
            raise CorruptImageError(self.names[index], "the zip is damaged before it")
        begin = LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack_from(data))
        if begin > BESIDE:
            data += self.archives.read(self.where, offset + len(data), begin - BESIDE)
        return begin, data

    def _check(self, index: int, encrypted: bool, size: int, method: int) -> None:
        where = f"{self.names[index]!r} in {self.where!r}"
        if encrypted:
            raise UserError(f"{where} is encrypted; expected a zip without a password; pack it again without one")
        if size > MEMBER_LIMIT_BYTES:
            raise UserError(f"{where} unpacks to {size} bytes; expected files up to {MEMBER_LIMIT_BYTES} bytes; remove it")
        if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"{where} is packed in an unknown way; expected stored or deflated; pack it again")


def open_zip(path: str) -> zipfile.ZipFile:
    """The zip at `path`, opened. Raises a UserError if it cannot be read, or is no zip."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise zipfile.BadZipFile("not a regular file")
        return zipfile.ZipFile(path)
    except OSError as error:
        raise unreadable(path, error) from error
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise _no_zip(path) from error


def member_name(info: zipfile.ZipInfo) -> str:
    """The path of a zip entry, as if it had been packed from the root by a tool that writes forward slashes."""
    return posixpath.normpath(info.filename.replace("\\", "/")).lstrip("/")


def _entries(path: str, infos: Iterable[zipfile.ZipInfo]) -> npt.NDArray[Any]:
    rows = [(i.header_offset, i.compress_size, i.file_size, i.CRC, i.compress_type, bool(i.flag_bits & 1)) for i in infos]
    try:
        return np.array(rows, dtype=ENTRY)
    except OverflowError:
        raise _no_zip(path) from None


def _no_zip(path: str) -> UserError:
    return UserError(f"{path!r} is not a readable zip file; expected a folder or a .zip of images; pack or download it again")


def _inflate(packed: bytes, size: int) -> bytes:
    """Unpack deflated bytes, but no more than one byte past the size they should have; nothing where they are damaged."""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size + 1)
    except zlib.error:
        return b""
