"""Where tensors live, whether the same step gives the same bits there, and what machine it is."""

import contextlib
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trigflow.runtime.errors import UserError
from trigflow.version import __version__


@contextlib.contextmanager
def in_float32() -> Iterator[None]:
    """Modules that are made within have float32 weights, whatever `torch.set_default_dtype` says."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check_default_device() -> None:
    """Raise a UserError where tensors are made elsewhere than on the CPU by default: all random numbers are drawn there."""
    found = torch.get_default_device()
    if found.type != "cpu":
        raise UserError(
            f"torch's default device is {found}; expected none, as noise is drawn on the CPU; drop torch.set_default_device "
            "and say device= instead"
        )


def resolve_device(device: str | torch.device | None, option: str = "device") -> torch.device:
    """`auto` or None: CUDA where there is one, otherwise the CPU; else the named device. Raises a UserError for a device that
    does not exist here, or where there is a default device (see `check_default_device`); `option` is where it was said."""
    check_default_device()
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found, dtype=torch.float32)
        if found.type == "meta":
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        reason = reason if len(reason) < 80 else "there is none here"  # PyTorch may list all that it can do instead
        raise UserError(
            f"device {str(device)[:40]!r} cannot be used ({reason}); expected cpu, cuda or auto; change {option}"
        ) from None
    return found


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """A block in which convolutions on CUDA add in one order, so that the same step gives the same bits.

    cuDNN's fastest gradients of float32 convolutions add as threads come, and two equal runs then differ in the last bits. On
    other devices nothing changes.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, threads, versions."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "trigflow": __version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
