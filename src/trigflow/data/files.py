"""The files of a folder or a zip, seen alike: sorted names and a way to read each. Nothing is ever written."""

from __future__ import annotations

import os
import posixpath
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from trigflow.data.decode import CorruptImageError
from trigflow.errors import UserError

MEMBER_LIMIT_BYTES = 1 << 29
"""Largest file read out of a zip; a small zip can claim to unpack to any size."""

LOCAL_HEADER = struct.Struct("<4s22xHH")
"""What stands before the bytes of a file in a zip: signature, lengths of the name and of the extra field that follow."""


@dataclass(frozen=True)
class Files:
    """What a folder or zip holds.

    Attributes:
        where: its path, for messages.
        names: relative paths with `/` between parts, sorted part by part; hidden files are not among them.
        read: gives the bytes of a name. Raises UserError if it may not be read, CorruptImageError if a zip is damaged there.
    """

    where: str
    names: tuple[str, ...]
    read: Callable[[str], bytes]


@contextmanager
def open_files(path: str) -> Iterator[Files]:
    """The files of the folder or zip at `path`, listed once, on entry.

    Raises:
        UserError: if it, or a folder in it, cannot be read, or it is neither a folder nor a zip.
    """
    if os.path.isdir(path):
        yield Files(path, _list_folder(path), lambda name: _read_file(os.path.join(path, name)))
        return
    with _open_zip(path) as archive:
        members = {_member_name(info): info for info in archive.infolist() if not info.is_dir()}
        yield Files(path, _visible(members), lambda name: _read_member(archive, members[name]))


def stored_spans(path: str, names: Sequence[str]) -> list[tuple[int, int]] | None:
    """Where the bytes of these files lie in the zip at `path`, as (offset, length) of each.

    None if it is no zip, or one of them is compressed, encrypted, or not whole.
    """
    if os.path.isdir(path):
        return None
    spans = []
    with _open_zip(path) as archive, open(path, "rb") as file:
        members = {_member_name(info): info for info in archive.infolist()}
        for name in names:
            info = members[name]
            file.seek(info.header_offset)
            header = file.read(LOCAL_HEADER.size)
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or len(header) < LOCAL_HEADER.size:
                return None
            signature, name_length, extra_length = LOCAL_HEADER.unpack(header)
            if signature != b"PK\3\4":
                return None
            spans.append((info.header_offset + LOCAL_HEADER.size + name_length + extra_length, info.file_size))
    return spans


def _list_folder(path: str) -> tuple[str, ...]:
    try:
        return _visible(_walk(path))
    except OSError as error:
        raise _unreadable(error.filename or path, error) from error


def _open_zip(path: str) -> zipfile.ZipFile:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise zipfile.BadZipFile("not a regular file")
        return zipfile.ZipFile(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise UserError(
            f"{path!r} is not a readable zip file; expected a folder or a .zip of images; pack or download it again"
        ) from error


def _member_name(info: zipfile.ZipInfo) -> str:
    """The path of a zip entry, as if it had been packed from the root by a tool that writes forward slashes."""
    return posixpath.normpath(info.filename.replace("\\", "/")).lstrip("/")


def _visible(names: Iterable[str]) -> tuple[str, ...]:
    """Drop what file managers leave behind: names with a part that starts with a dot, and `__MACOSX`."""
    parts = (name.split("/") for name in names)
    kept = [p for p in parts if not any(part.startswith(".") or part == "__MACOSX" for part in p)]
    return tuple("/".join(p) for p in sorted(kept))


def _walk(folder: str, prefix: str = "", parents: tuple[str, ...] = ()) -> Iterator[str]:
    """Names of all files below `folder`. Links are followed, though never back into a folder they are in."""
    real = os.path.realpath(folder)
    if real in parents:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/", (*parents, real))
            elif entry.is_file() or entry.is_symlink():
                yield prefix + entry.name


def _read_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    where = f"{info.filename!r} in {archive.filename!r}"
    if info.flag_bits & 1:
        raise UserError(f"{where} is encrypted; expected a zip without a password; pack it again without one")
    if info.file_size > MEMBER_LIMIT_BYTES:
        raise UserError(
            f"{where} unpacks to {info.file_size} bytes; expected files up to {MEMBER_LIMIT_BYTES} bytes; remove it"
        )
    try:
        return archive.read(info)
    except NotImplementedError as error:
        raise UserError(f"{where} is packed in an unknown way; expected stored or deflated; pack it again") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise CorruptImageError(info.filename) from error


def _unreadable(path: str, error: OSError) -> UserError:
    return UserError(
        f"cannot read {path!r} ({error.strerror or error}); expected a file or folder that this user may read; "
        "check the path and its permissions"
    )
