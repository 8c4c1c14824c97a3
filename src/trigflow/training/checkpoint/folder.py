"""The checkpoints of a run: which there are, whether they are sound, which are kept."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from trigflow.runtime.distributed import gather, on_first, share_of
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import clear_leftovers, owned, read_json
from trigflow.training.checkpoint.part import digest_of
from trigflow.training.checkpoint.stored import Stored

FORMAT = 2
"""Format 1 had a single file of tensors and no checksums; it can still be read."""
COUNTERS = ("iteration", "skipped")
"""Whole numbers that every `state.json` has."""
RUN_FILES = frozenset({"config.json", "metrics.jsonl", "model.json", "network.safetensors"})
"""What a run writes into its folder beside checkpoints."""


class DamagedCheckpointError(UserError):
    """A checkpoint whose files are not what was written."""


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run that were written to the end, oldest first."""
    found = (folder / "checkpoints").glob("[0-9]*")
    whole = [path for path in found if path.name.isdecimal() and (path / "state.json").is_file()]
    return sorted(whole, key=lambda path: int(path.name))  # from 100,000,000 on names have more digits


def clear_unfinished(folder: Path) -> None:
    """Remove the unfinished checkpoints, snapshots, pictures and files that a killed run left in its folder."""
    clear_leftovers(folder / "checkpoints", str.isdigit)
    clear_leftovers(folder / "ema", lambda name: name.endswith((".safetensors", ".json")))
    clear_leftovers(folder / "samples", lambda name: name.endswith(".png"))
    clear_leftovers(folder, RUN_FILES.__contains__)


def retire(folder: Path, keep: int, keep_every: int = 0) -> None:
    """Delete all checkpoints but the newest `keep`, and those of multiples of `keep_every`; each is gone as a whole."""
    for path in list_checkpoints(folder)[:-keep]:
        if not (keep_every and int(path.name) % keep_every == 0):
            with owned(path):
                shutil.rmtree(path.rename(path.with_name(f".{path.name}-obsolete")))


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint to `<iteration>-damaged`, where nothing takes it for one."""
    aside = path.with_name(f"{path.name}-damaged")
    if aside.exists():
        shutil.rmtree(aside)
    return path.rename(aside)


def seal(state: dict[str, Any]) -> dict[str, Any]:
    """The content of `state.json`: `state` and a checksum of it."""
    return {**state, "checksum": _checksum(state)}


def read_state(path: Path) -> dict[str, Any] | None:
    """The content of `state.json`, or None where it is not what was written. Raises a UserError for that of another version."""
    try:
        state = read_json(path / "state.json", "checkpoint")
    except UserError:
        return None
    if not isinstance(state, dict) or not all(type(state.get(name)) is int and state[name] >= 0 for name in COUNTERS):
        return None
    if "checksum" in state and state["checksum"] != _checksum(state):
        return None
    if state.get("format") not in (1, FORMAT):
        raise UserError(
            f"checkpoint '{path}' has format {state.get('format')}; expected {FORMAT}; resume with the version that wrote it"
        )
    if state["format"] == FORMAT and "checksum" not in state:
        return None
    return state


def check_checkpoint(path: Path) -> dict[str, Any]:
    """Compare the files of a checkpoint with their checksums; returns the content of `state.json`.

    All processes of a run call this together, and each reads its share of the files. A checkpoint of format 1 has no checksums:
    its numbers are taken as they are, as long as the file has its full length.

    Raises:
        DamagedCheckpointError: when a file is missing, truncated or changed; in all processes.
        UserError: when it was written by another version.
    """
    state = on_first(lambda: read_state(path))
    if state is None:
        raise DamagedCheckpointError(
            f"'{path / 'state.json'}' is no state of a run, or has been changed; expected what training wrote; "
            "delete this checkpoint to resume from the one before"
        )
    files = files_of(state)
    share = share_of(len(files))
    faults = [_fault(path / name, record) for name, record in list(files.items())[share.start : share.stop]]
    found = next((fault for part in gather(faults) for fault in part if fault), "")
    if found:
        raise DamagedCheckpointError(
            f"checkpoint '{path}' cannot be read ({found}); expected the files that training wrote; restore them, or delete "
            "this checkpoint to resume from the one before"
        )
    return state


def open_checkpoint(path: Path) -> Stored:
    """The tensors of a checkpoint, compared with their checksums first; a context manager; errors as `check_checkpoint`."""
    return Stored(path, list(files_of(check_checkpoint(path))))


def files_of(state: dict[str, Any]) -> dict[str, Any]:
    """Names of the files of tensors, and their records where there are any."""
    return state["files"] if state["format"] > 1 else {"state.safetensors": None}


def _fault(path: Path, record: dict[str, Any] | None) -> str:
    """What is wrong with a file, if anything."""
    try:
        if record is None:
            with Stored(path.parent, [path.name]):
                return ""
        size = path.stat().st_size
        if size != record["bytes"]:
            return f"'{path.name}' has {size} bytes, not {record['bytes']}"
        return "" if digest_of(path) == record["sha256"] else f"the checksum of '{path.name}' does not match"
    except FileNotFoundError:
        return f"'{path.name}' does not exist"
    except OSError as error:
        return f"'{path.name}': {error.strerror or error}"
    except UserError:
        return f"'{path.name}' is no whole safetensors file"


def _checksum(state: dict[str, Any]) -> str:
    rest = {name: value for name, value in state.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
