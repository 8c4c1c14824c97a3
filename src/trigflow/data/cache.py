"""What took long to find out about data, kept in the user's cache folder: `$TRIGFLOW_CACHE`, or `~/.cache/trigflow`.

An entry belongs to a path and settings, and holds for one state of the files there: their names, sizes and times of the last
change. It is made anew when any of these differs. Nothing breaks without it: an entry that cannot be read is made again, and
one that cannot be written is not kept.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trigflow.runtime.errors import UserError
from trigflow.runtime.files import clear_leftovers, replacing

Arrays = dict[str, npt.NDArray[Any]]
VERSION = 2
STATE = "state"


def cache_folder() -> Path:
    """`$TRIGFLOW_CACHE`, else `trigflow` in `$XDG_CACHE_HOME` or in `~/.cache`. Raises a UserError where there is no home."""
    if own := os.environ.get("TRIGFLOW_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trigflow"
    except RuntimeError:
        raise UserError("no home folder to keep a cache in; expected one; name another folder in TRIGFLOW_CACHE") from None


def remembered(subject: list[Any], state: list[Any], make: Callable[[], Arrays]) -> Arrays:
    """What `make()` gave for this subject when it was last in this state, or what it gives now.

    Args:
        subject: what it is about: path and settings, in plain types.
        state: what it depends on, in plain types.
        make: gives the arrays; an entry of another state of the same subject is replaced by them.
    """
    try:
        path = cache_folder() / "data" / f"{digest_of_text(json.dumps(subject))}.npz"
    except UserError:
        return make()
    digest = digest_of_text(json.dumps([VERSION, subject, state]))
    # Damaged files end in all kinds of exceptions.
    with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as file:
        if str(file[STATE]) == digest:
            return {name: file[name] for name in file.files if name != STATE}
    arrays = make()
    with contextlib.suppress(OSError, UserError):
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path.parent, lambda name: name.endswith(".npz"))
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **{STATE: np.array(digest), **arrays})  # type: ignore[arg-type] # the names are not its options
    return arrays


def digest_of_text(text: str) -> str:
    """Tells a text from others."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
