"""What the U-Nets have in common: the order of their blocks, and a residual block."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from trigflow.networks.layers import check_at_least_one, check_setting, downsample, upsample
from trigflow.networks.text import Context


class Step(NamedTuple):
    """One block of a U-Net.

    Attributes:
        kind: "encoder" and "decoder" blocks, "down" and "up" between levels, "in0" and "in1" in the middle.
        level: of its output, 0 the finest.
        number: of an encoder or decoder block among those of its level.
        c_in: channels that go in, those of a kept output included.
        c_out: channels that come out.
    """

    kind: Literal["encoder", "down", "in0", "in1", "up", "decoder"]
    level: int
    number: int
    c_in: int
    c_out: int

    def name(self, resolution: int) -> str:
        """As EDM published it, for images of this side: `16x16_down`, `16x16_block0`, `8x8_in0`."""
        side = resolution >> self.level
        return f"{side}x{side}_" + (f"block{self.number}" if self.kind in ("encoder", "decoder") else self.kind)


def steps(first: int, widths: Sequence[int], blocks: int) -> Iterator[Step]:
    """The blocks of a U-Net in the order in which they run, after an input convolution to `first` channels.

    The encoder halves the resolution before every level but the first and has `blocks` blocks a level; every output is kept,
    that of the convolution too. The decoder has two blocks at the coarsest level, then `blocks + 1` blocks a level, each of
    which takes the last kept output that is left, and doubles the resolution before every level but the first.
    """
    kept, c = [first], first
    for level, width in enumerate(widths):
        if level > 0:
            yield Step("down", level, 0, c, c)
            kept.append(c)
        for i in range(blocks):
            yield Step("encoder", level, i, c, width)
            c = width
            kept.append(c)
    for level, width in reversed([*enumerate(widths)]):
        if level == len(widths) - 1:
            yield Step("in0", level, 0, c, c)
            yield Step("in1", level, 0, c, c)
        else:
            yield Step("up", level, 0, c, c)
        for i in range(blocks + 1):
            yield Step("decoder", level, i, c + kept.pop(), width)
            c = width


def check_levels(config: Any) -> None:
    """Raise a UserError for channels, width, blocks and mult of a U-Net that make no sense."""
    check_at_least_one(config, "channels", "width", "blocks")
    fine = bool(config.mult) and min(config.mult) >= 1
    check_setting(fine, "mult", config.mult, "one number >= 1 for each level")


class ResidualBlock(nn.Module):
    """A residual block, and attention after it where a subclass has it::

        h = condition(conv0(resample(silu(norm0(x)))), emb)
        x <- attend((skip(resample(x)) + conv1(drop(silu(h)))) / sqrt(2))

    Shapes: x `(b, c_in, h, w)`, emb `(b, e)`; result `(b, c_out, h', w')`, where `size` (if given) is `(h', w')` of an
    upsampling block and `down` halves the resolution; a text is a `Context`.
    """

    down: bool
    norm0: nn.Module
    conv0: nn.Conv2d
    dropout: nn.Module
    conv1: nn.Conv2d
    skip: nn.Conv2d | None

    def forward(self, x: Tensor, emb: Tensor, size: tuple[int, int] | None = None, context: Context | None = None) -> Tensor:
        h = F.silu(self.norm0(x))
        if self.down:
            x, h = downsample(x), downsample(h)
        elif size is not None:
            x, h = upsample(x, size), upsample(h, size)
        h = self.condition(self.conv0(h), emb)
        h = self.conv1(self.dropout(F.silu(h)))
        return self.attend((h + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5), context)

    def condition(self, h: Tensor, emb: Tensor) -> Tensor:
        """Normalization, scaled and shifted by the conditioning vector; `(b, c_out, h', w')` to the same."""
        raise NotImplementedError

    def attend(self, x: Tensor, context: Context | None) -> Tensor:
        """`x`, or what attention makes of it, to a text too where there is one."""
        raise NotImplementedError
