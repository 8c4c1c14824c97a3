"""Parts of a training that are compiled: the losses with their tangents, the average, or the blocks of networks."""

import os
from collections.abc import Callable
from typing import Any

import torch

from trigflow.data.cache import cache_folder
from trigflow.tangent import Compiled
from trigflow.training.log import warn

BACKEND = "inductor"
"""Of `torch.compile`."""


WORTH = 5_000
"""Iterations from which on compiling, which takes minutes, pays on a GPU."""


def is_compiled(setting: str, device: torch.device, iterations: int) -> bool:
    """What `loop.compile` means for a run on a device: auto is on for CUDA, where launches of small kernels take much of a
    step, for runs that are not short."""
    return device.type == "cuda" and iterations >= WORTH if setting == "auto" else setting != "off"


def compiled(function: Callable[..., Any], name: str, setting: str = "on", **settings: Any) -> Compiled:
    """A function in its compiled form, for `loop.compile` as it is set.

    Compiled code is kept for the next process in `compiled` of the user's cache folder, or where `TORCHINDUCTOR_CACHE_DIR`
    says. What cannot be compiled runs as it is, and the log says so in one line. Further settings are those of `Compiled`.
    """
    cache = None if "TORCHINDUCTOR_CACHE_DIR" in os.environ else cache_folder() / "compiled"
    mode = "reduce-overhead" if setting == "graphs" else None
    return Compiled(function, name=name, mode=mode, backend=BACKEND, cache=cache, tell=warn, **settings)
