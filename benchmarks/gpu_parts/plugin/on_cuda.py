"""A plugin for pytest that runs tests which know nothing of GPUs on one.

    PYTHONPATH=src:benchmarks/gpu_parts/plugin pytest -p on_cuda tests/tangent/rules

It lies in a folder of its own, because the names of other files here are those of folders of tests. The numbers that tests
draw, and whatever they make without naming a device, are on the device; tiny training runs go there too.
TRIGFLOW_TEST_DEVICE names it (cuda); TRIGFLOW_TEST_PARTS says which of `draw` and `train` is done (draw).
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

DEVICE = os.environ.get("TRIGFLOW_TEST_DEVICE", "cuda")
PARTS = os.environ.get("TRIGFLOW_TEST_PARTS", "draw").split(",")


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported."""
    if "train" in PARTS:
        import training.tiny as tiny

        make: Any = tiny.tiny_config

        def tiny_config(changes: dict[str, Any] | None = None) -> Any:
            return make({"loop.device": DEVICE, **(changes or {})})

        tiny.tiny_config = tiny_config
    if "draw" in PARTS:
        import networks.helpers as nets
        import tangent.helpers as tangents

        for module in (tangents, nets):
            module.draw = on_device(module.draw)
        torch.set_default_device(DEVICE)


def on_device(draw: Any) -> Any:
    """`draw` on the CPU, whose generators tests name, and its numbers on the device."""

    def drawn(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return draw(*args, **kwargs).to(DEVICE)

    return drawn
