"""Where tensors live, and whether the same step gives the same bits there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from trigflow.runtime.errors import UserError


def resolve_device(device: str | torch.device | None, option: str = "device") -> torch.device:
    """`auto` or None: CUDA where there is one, otherwise the CPU; else the named device.

    Raises:
        UserError: for a device that does not exist here; `option` is where it was said.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
        if found.type == "meta":
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError) as error:
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
