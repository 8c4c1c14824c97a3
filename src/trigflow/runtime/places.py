"""Places to write to, looked at before the work for them begins, so that nobody waits for what cannot be kept."""

import os
import tempfile
from pathlib import Path
from typing import Literal

from trigflow.runtime.errors import UserError, shortened

LONGEST = 230
"""Most bytes of a name; most file systems take 255, and what is being written has a longer one until it is whole."""


def check_place(path: str | os.PathLike[str], kind: Literal["file", "folder", "new folder"], option: str = "--out") -> Path:
    """Require that a file or folder can be written at a path. Nothing is left there; folders above it may be missing.

    Args:
        path: where to write.
        kind: `folder` may be there and hold something, `new folder` may be there if it is empty; a file is written over.
        option: what the user named it by, for messages.

    Raises:
        UserError: if something of another kind is there, the folder above cannot be made or written to, or a name is too long.
    """
    try:
        place = Path(path)
        if "\0" in os.fspath(place):
            raise ValueError("it holds a NUL")
        there = place if place.is_absolute() else Path.cwd() / place
        longest = max((len(os.fsencode(part)) for part in there.parts), default=0)
        if longest > LONGEST:
            raise _no_place(place, f"a name of {longest} bytes", f"names of at most {LONGEST}", option)
        if there.is_dir() if kind == "file" else there.exists() and not there.is_dir():
            other = "folder" if kind == "file" else "file"
            raise _no_place(place, f"there is a {other} of that name", f"the name of a {kind}", option)
        if kind == "new folder" and there.is_dir() and any(there.iterdir()):
            raise _no_place(place, "it exists already and is not empty", "a new or empty folder", option)
        above = there.parent if kind == "file" else there
        while not above.exists() and above != above.parent:
            above = above.parent
        with tempfile.TemporaryFile(dir=above):
            return place
    except OSError as error:
        raise _no_place(place, error.strerror or str(error), "a place that can be written to", option) from None
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path!r} is no path ({error}); expected the name of a {kind}; correct {option}") from None


def check_outside(path: str | os.PathLike[str], source: str, option: str = "--out") -> None:
    """Require that a path does not lie in the folder of the data, where what is written would be taken for data.

    Args:
        path: where to write; links are followed.
        source: the folder of the data; a name or address that is no folder here is fine.
        option: what the user named the path by, for messages.

    Raises:
        UserError: if it is that folder, or lies in it.
    """
    folder = os.path.expanduser(source)
    if "\0" in folder or not os.path.isdir(folder):
        return
    inside, data = os.path.realpath(path), os.path.realpath(folder)
    if os.path.commonpath([inside, data]) == data:
        raise _no_place(Path(path), f"it is in the data '{source}'", f"an {option} outside of the data", option)


def _no_place(path: Path, reason: str, expected: str, option: str) -> UserError:
    return UserError(f"cannot write '{shortened(path)}' ({reason}); expected {expected}; choose another {option}")
