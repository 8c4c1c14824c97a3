"""Where tensors live."""

from __future__ import annotations

import torch

from trigflow.runtime.errors import UserError


def resolve_device(device: str | torch.device | None) -> torch.device:
    """`auto` or None: CUDA where there is one, otherwise the CPU; else the named device.

    Raises:
        UserError: for a device that does not exist here.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device '{device}' cannot be used ({str(error).splitlines()[0]}); expected cpu, cuda or auto; change loop.device"
        ) from None
    return found
