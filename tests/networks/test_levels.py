"""The order of the blocks of a U-Net, and the residual block that two of them share."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trigflow.networks.levels import ResidualBlock, Step, steps


def test_the_steps_of_two_levels() -> None:
    assert list(steps(4, [8, 12], 1)) == [
        Step("encoder", 0, 0, 4, 8),
        Step("down", 1, 0, 8, 8),
        Step("encoder", 1, 0, 8, 12),
        Step("in0", 1, 0, 12, 12),
        Step("in1", 1, 0, 12, 12),
        Step("decoder", 1, 0, 12 + 12, 12),
        Step("decoder", 1, 1, 12 + 8, 12),
        Step("up", 0, 0, 12, 12),
        Step("decoder", 0, 0, 12 + 8, 8),
        Step("decoder", 0, 1, 8 + 4, 8),
    ]


@pytest.mark.parametrize("widths", [[8], [8, 12], [4, 8, 12, 16]])
@pytest.mark.parametrize("blocks", [1, 3])
def test_every_output_is_kept_once_and_taken_once(widths: list[int], blocks: int) -> None:
    kept, c, level = [6], 6, 0
    for step in steps(6, widths, blocks):
        taken = kept.pop() if step.kind == "decoder" else 0
        assert step.c_in == c + taken
        assert step.level - level == {"down": 1, "up": -1}.get(step.kind, 0)
        c, level = step.c_out, step.level
        if step.kind in ("encoder", "down"):
            kept.append(c)
    assert not kept
    assert (c, level) == (widths[0], 0)


def test_published_names() -> None:
    names = [step.name(32) for step in steps(4, [4, 4], 1)]
    assert names[:5] == ["32x32_block0", "16x16_down", "16x16_block0", "16x16_in0", "16x16_in1"]
    assert names[5:] == ["16x16_block0", "16x16_block1", "32x32_up", "32x32_block0", "32x32_block1"]


@pytest.mark.parametrize("size", [None, (5, 6)])
@pytest.mark.parametrize("channels", [2, 3])
def test_the_formula_of_a_block(channels: int, size: Any) -> None:
    class Block(ResidualBlock):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.norm0, self.dropout = False, nn.Identity(), nn.Identity()
            self.conv0, self.conv1 = nn.Conv2d(2, channels, 1), nn.Conv2d(channels, channels, 1)
            self.skip = nn.Conv2d(2, channels, 1) if channels != 2 else None

        def condition(self, h: Tensor, emb: Tensor) -> Tensor:
            return h * emb

        def attend(self, x: Tensor, context: object) -> Tensor:
            return 3 * x

    block, x = Block().double(), torch.linspace(-2, 2, 2 * 2 * 3 * 3, dtype=torch.float64).reshape(2, 2, 3, 3)
    y = x if size is None else F.interpolate(x, scale_factor=2.0)[..., :5, :6]
    h = block.conv1(F.silu(block.conv0(F.silu(y)) * 0.5))
    expected = 3 * (h + (y if block.skip is None else block.skip(y))) / math.sqrt(2)
    torch.testing.assert_close(block(x, torch.tensor(0.5), size), expected, rtol=1e-12, atol=1e-12)
