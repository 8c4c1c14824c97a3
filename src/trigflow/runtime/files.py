"""Files that are either whole or absent: everything is written beside its destination and renamed into place."""

import contextlib
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from trigflow.runtime.errors import UserError
from trigflow.runtime.tensors import content, layout

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LEFTOVER = re.compile(r"\.(?P<stem>.+)-[a-z0-9_]{8}(?P<end>\.\w+)?(?P<aside>-before)?")
"""Temporary names: of `replacing` (stem and ending of a file), and of folders, set aside by `replace_folder` or not."""
PARTIAL = ".partial"
"""Ending of the temporary names of `write_folder`, by which it knows its own in folders that belong to others."""
FOREIGN = re.compile(r"\.tmp[A-Za-z0-9]{6}")
"""Temporary names of the writer of safetensors, which earlier versions used."""


@contextmanager
def owned(path: Path) -> Iterator[None]:
    """Have `clear_leftovers` leave a file or folder alone, under any name, until the block or this process ends.

    Held by locking it. Several processes may own a folder. Where there are no such locks, as on Windows, nothing is held.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH)  # waits for `_free` alone, which lasts as long as it takes to remove a leftover
        yield
    finally:
        os.close(handle)


def is_owned(path: Path) -> bool:
    """Whether a process that lives holds this with `owned`."""
    with _free(path) as free:
        return not free


@contextmanager
def alone(folder: Path, patience: float = 1.0) -> Iterator[None]:
    """Have a folder to this process, among all that ask for it so, until the block or this process ends; what it forks holds
    nothing. Where there are no such locks, as on Windows and on NFS, nobody does.

    Raises a UserError while another process has it, after so many seconds: one that was killed may be about to vanish.
    """
    handle = None
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY) if fcntl else None
        _alone.update([handle] if handle is not None else [])
    try:
        end = time.monotonic() + patience
        while handle is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    raise UserError(
                        f"another process is training in '{folder}'; expected one at a time; wait until it has ended, or "
                        "choose another --out"
                    ) from None
                time.sleep(0.02)
                continue
            except OSError:
                pass
            break
        yield
    finally:
        if handle in _alone:
            _alone.discard(handle)
            os.close(handle)


_alone: set[int] = set()


def _let_go() -> None:
    while _alone:
        os.close(_alone.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def _free(path: Path) -> Iterator[bool]:
    """Whether no process that lives holds this with `owned`; while the block lasts, none begins to."""
    if fcntl is None:
        yield True
        return
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # NFS locks only what is open for writing
    except OSError:  # it has its final name by now, or belongs to another user
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError as error:
            free = not isinstance(error, BlockingIOError)
        yield free
    finally:
        os.close(handle)


@contextmanager
def _beside(path: Path, stem: str, ending: str, make: Callable[[Path], None], expected: str) -> Iterator[Path]:
    """A new file or folder of a temporary name beside `path`, owned; what the block leaves under that name vanishes. Raises a
    UserError for an OSError, and for that of a writer of safetensors."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            while temporary is None or not temporary.exists():  # another process may clear it up before it is owned
                made = path.with_name(f".{stem}-{secrets.token_hex(4)}{ending}")
                make(made)
                temporary = made
                with contextlib.suppress(FileNotFoundError):
                    stack.enter_context(owned(temporary))
            yield temporary
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot write '{path}' ({reason}); expected {expected}, with space left; choose another --out"
        ) from None
    finally:
        if temporary is not None:
            _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def ensure_folder(path: Path) -> Path:
    """Create a folder (and its parents) that can be written to. Raises a UserError when it is a file, or cannot be created or
    written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to '{path}' ({error.strerror or error}); expected a folder that can be written; choose another --out"
        ) from None
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, which is made if need be; it becomes `path` when the block ends well, or vanishes.
    Raises a UserError when it cannot be written: no permission, no space."""

    def make(temporary: Path) -> None:
        temporary.touch(exist_ok=False)

    with _beside(path, path.stem, path.suffix, make, "a file in a folder that can be written") as temporary:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names may be no text


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented. NaN and infinity are refused, because JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file. Raises a UserError when it is missing or no JSON; `what` names it in the message."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        reason = "is a folder" if isinstance(error, IsADirectoryError) else reason
        raise UserError(f"{what} '{path}' {reason}; expected a JSON file; check the path") from None


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str] | None = None,
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Write a safetensors file atomically, from any device.

    Args:
        path: of the file.
        tensors: by name.
        metadata: text that goes into the header.
        read: gives the numbers of a tensor when it is written; `tensors` then holds formats and shapes only, as on `meta`.
    """
    head, names = layout(tensors, metadata)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(head)
        for name in names:
            file.write(content(tensors[name] if read is None else read(name)))


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU. Raises a UserError when it is missing, truncated or no safetensors file; `what`
    names it in the message."""
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{what} '{path}' {reason}; expected a safetensors file; check the path")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{what} '{path}' cannot be read ({error}); expected a whole safetensors file; restore it or use another"
        ) from None


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Create the folder `path`, and those above it, with the files that `fill(folder)` writes, all or none; what killed writers
    of it left goes. A link is followed. Raises a UserError when it cannot be written: no permission, no space."""
    path = path.resolve() if path.is_symlink() else path

    def make(temporary: Path) -> None:
        clear_leftovers(path.parent, f"{path.name}{PARTIAL}".__eq__)
        temporary.mkdir()

    with _beside(path, path.name, PARTIAL, make, "a folder that can be created") as temporary:
        fill(temporary)
        replace_folder(path, temporary)


def replace_folder(path: Path, temporary: Path) -> None:
    """Give the folder `temporary`, beside `path`, that name; what has had it is deleted."""
    if path.exists():
        with owned(path):
            before = path.rename(temporary.with_name(f"{temporary.name}-before"))
            temporary.rename(path)
            shutil.rmtree(before)
    else:
        temporary.rename(path)


def sync_folder(path: Path) -> None:
    """Have the names in a folder reach the disk, where the file system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def clear_leftovers(folder: Path, mine: Callable[[str], bool]) -> None:
    """Remove what writers that were killed left in `folder`, and leave what a process that lives is writing.

    Where `replace_folder` was killed between setting a folder aside and putting the new one in its place, the one set aside
    is put back.

    Args:
        folder: may be missing.
        mine: whether a file or folder of this final name is the caller's to clear up; `PARTIAL` is at the end of the name of
            those of `write_folder`.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = LEFTOVER.fullmatch(path.name)
        if match is not None:
            final = match["stem"] + (match["end"] or "")
        elif FOREIGN.fullmatch(path.name) and path.is_file():
            final = "network.safetensors"
        else:
            continue
        if not mine(final):
            continue
        with _free(path) as free:
            if free and match and match["aside"] and not (folder / match["stem"]).exists():
                path.rename(folder / match["stem"])
            elif free:
                _remove(path)
