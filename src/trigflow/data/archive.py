"""A zip that grows entry by entry and can be taken up again after a kill.

Entries are stored uncompressed, in a fixed order, with fixed dates, so that the same entries give the same file, bit for bit,
however often its writing was interrupted. Each carries the fingerprint of what it was made from in an extra field, which
other programs pass over.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

SIGNATURE = b"PK\3\4"
LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
EXTRA = struct.Struct("<HHIQ")
EXTRA_ID = 0x6674
"""Of our extra field: CRC and length of the source of an entry."""


@dataclass(frozen=True)
class Fingerprint:
    """CRC-32 and length of some bytes."""

    crc: int
    length: int

    @classmethod
    def of(cls, data: bytes) -> Fingerprint:
        """That of these bytes."""
        return cls(zlib.crc32(data), len(data))


@dataclass(frozen=True)
class Entry:
    """A whole entry of the file: what the zip's index needs to know of it, and what it was made from."""

    info: zipfile.ZipInfo
    source: Fingerprint
    end: int
    """Where the next entry begins."""


def entry_info(name: str, source: Fingerprint) -> zipfile.ZipInfo:
    """The header of an entry, the same whenever and wherever it is written."""
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.create_system = 3
    info.external_attr = 0o644 << 16
    info.extra = EXTRA.pack(EXTRA_ID, EXTRA.size - 4, source.crc, source.length)
    return info


def whole_entries(file: BinaryIO) -> Iterator[tuple[Entry, bytes]]:
    """The entries from the beginning of the file and their contents, up to the first that is not whole."""
    start = 0
    while True:
        file.seek(start)
        header = file.read(LOCAL_HEADER.size)
        if len(header) < LOCAL_HEADER.size:
            return
        signature, _, _, method, _, _, crc, packed, size, name_length, extra_length = LOCAL_HEADER.unpack(header)
        rest = file.read(name_length + extra_length)
        name, extra = rest[:name_length], rest[name_length:]
        data = file.read(size)
        if signature != SIGNATURE or method != zipfile.ZIP_STORED or packed != size or len(extra) != EXTRA.size:
            return
        extra_id, _, source_crc, source_length = EXTRA.unpack(extra)
        if extra_id != EXTRA_ID or len(data) != size or zlib.crc32(data) != crc:
            return
        source = Fingerprint(source_crc, source_length)
        try:
            info = entry_info(name.decode(), source)
        except UnicodeDecodeError:
            return
        info.CRC, info.compress_size, info.file_size, info.header_offset = crc, size, size, start
        start = file.tell()
        yield Entry(info, source, start), data


Add = Callable[[str, Fingerprint, bytes], None]


@contextmanager
def appending(path: Path, entries: list[Entry]) -> Iterator[Add]:
    """A function that adds an entry (name, source, data) behind these, which the file begins with; the rest of it is cut off.

    When the block ends the file is a zip of all entries.
    """
    end = entries[-1].end if entries else 0
    with open(path, "r+b" if entries else "wb") as file:
        file.truncate(end)
        file.seek(end)
        with zipfile.ZipFile(file, "w") as archive:
            archive.infolist().extend(entry.info for entry in entries)
            yield lambda name, source, data: archive.writestr(entry_info(name, source), data)
