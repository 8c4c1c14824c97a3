"""What a part has found so far, in a file that is whole at any moment."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class Record:
    """Entries of one part, written to its file with every one that is added.

    Args:
        path: JSON file of the part.
        seconds: how long the part may take; it looks at `left()` between one measurement and the next.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path = path
        self.began = time.monotonic()
        self.limit = seconds
        self.entries: dict[str, Any] = {}

    def restart(self, seconds: float) -> None:
        """Count the time from now."""
        self.began, self.limit = time.monotonic(), seconds

    def left(self) -> float:
        """Seconds that are left."""
        return self.limit - (time.monotonic() - self.began)

    def put(self, name: str, value: Any) -> None:
        """Set an entry."""
        self.entries[name] = value
        self.write()

    def add(self, name: str, value: Any) -> None:
        """Append to an entry that is a list."""
        self.entries.setdefault(name, []).append(value)
        self.write()

    def write(self) -> None:
        """The file, replaced in one go."""
        self.entries["seconds"] = round(time.monotonic() - self.began, 1)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(readable(self.entries)), encoding="utf-8")
        os.replace(new, self.path)

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """An error inside becomes an entry of `failures`, and the part goes on."""
        try:
            yield
        except Exception as reason:
            self.add("failures", {"what": what, "error": first_line(reason), "where": place_of(reason)})
            traceback.print_exc()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def readable(value: Any) -> Any:
    """Numbers with five digits, and words for those that JSON does not have."""
    if isinstance(value, dict):
        return {str(k): readable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [readable(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value


def first_line(reason: BaseException) -> str:
    """Kind and first line of an error."""
    lines = str(reason).strip().splitlines() or ["no message"]
    return f"{type(reason).__name__}: {lines[0][:300]}"


def place_of(reason: BaseException) -> str:
    """File and line where an error was raised."""
    frames = traceback.extract_tb(reason.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def environment() -> dict[str, Any]:
    """What the figures depend on: the card, its driver, versions, the commit."""
    found: dict[str, Any] = {
        "device": "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "processors": os.cpu_count(),
        "commit": commit(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "memory_gib": properties.total_memory / 2**30,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        }
    for package in ("triton", "numpy"):
        try:
            found[package] = __import__(package).__version__
        except ImportError:
            found[package] = None
    return found


def driver() -> str | None:
    """Version of the driver, as nvidia-smi says it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def commit() -> str | None:
    """The commit of this checkout, or what the environment variable TRIGFLOW_COMMIT says where there is no repository."""
    if given := os.environ.get("TRIGFLOW_COMMIT"):
        return given
    here = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
