"""Classes of diffusers that its own tests of models leave out, in configurations of a few thousand parameters.

Each is like a class of those tests: what builds the network, and what it is called with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import torch
from torch import Tensor


class Configuration:
    """A class with `get_init_dict` and `get_dummy_inputs`, as the tests of diffusers have it."""

    def __init__(self, kind: str, settings: dict[str, Any], inputs: Callable[[], dict[str, Any]]) -> None:
        self.model_class = getattr(diffusers, kind)
        self.settings, self.inputs = settings, inputs

    def get_init_dict(self) -> dict[str, Any]:
        return dict(self.settings)

    def get_dummy_inputs(self) -> dict[str, Any]:
        return self.inputs()


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TIMES = torch.tensor([0.5, 0.75])
CASES: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {}


def cases() -> Iterator[tuple[str, str, Configuration]]:
    """Name of the class, of the configuration, and the configuration, where the installed diffusers has the class."""
    for kind, (settings, inputs) in CASES.items():
        if hasattr(diffusers, kind):
            yield kind, "ours", Configuration(kind, settings, inputs)
