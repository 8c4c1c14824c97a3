"""A DDPM++-style U-Net for images of any channel count and size.

After Song et al. 2021 (DDPM++) as used by Karras et al. 2022, with the changes of Lu and Song 2025, section 4.1, each a
switch: identity time, positional embedding, adaptive double normalization. `patch > 1` moves the whole U-Net to a coarser
grid (space to depth), which is what makes small images cheap on a CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trigflow.networks.embeddings import Conditioning, ConditioningConfig, NetworkConfig
from trigflow.networks.layers import (
    AdaptiveNorm,
    NormKind,
    SelfAttention,
    check_setting,
    downsample,
    from_patches,
    full_precision,
    norm_groups,
    to_patches,
    upsample,
    zero_bias,
)
from trigflow.runtime.errors import UserError


@dataclass(frozen=True)
class UNetConfig(NetworkConfig):
    """Configuration of `UNet`."""

    axes: ClassVar[int | None] = 3

    channels: int = 1
    """Image channels."""
    width: int = 64
    """Feature channels at the first level."""
    mult: tuple[int, ...] = (1, 2)
    """Channel multiplier of each level; each level after the first halves the resolution."""
    blocks: int = 2
    """Residual blocks per level (the decoder has one more)."""
    attention: tuple[int, ...] = ()
    """Levels (0 is the finest) whose blocks are followed by self-attention."""
    patch: int = 1
    """Side of the pixel block that becomes one position."""
    norm: NormKind = "double"
    """Adaptive double normalization, or AdaGN."""
    dropout: float = 0.0
    """Dropout inside the blocks, in [0, 1)."""
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)


class UNetBlock(nn.Module):
    """`h = conv1(drop(silu(adanorm(conv0(resample(silu(norm(x)))), emb))))`; returns `(skip(x) + h) / sqrt(2)`.

    Shapes: x `(b, c_in, h, w)`, emb `(b, e)`; result `(b, c_out, h', w')`, where `size` (if given) is `(h', w')` of an
    upsampling block and `down` halves the resolution.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        emb_width: int,
        norm: NormKind,
        dropout: float,
        *,
        down: bool = False,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.down = down
        self.norm0 = nn.GroupNorm(norm_groups(c_in), c_in)
        self.conv0 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm1 = AdaptiveNorm(c_out, emb_width, norm)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = nn.Conv2d(c_out, c_out, 3, padding=1)
        nn.init.normal_(self.conv1.weight, std=1e-5)
        zero_bias(self.conv1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None
        self.attention = SelfAttention(c_out) if attention else None

    def forward(self, x: Tensor, emb: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        h = F.silu(self.norm0(x))
        if self.down:
            x, h = downsample(x), downsample(h)
        elif size is not None:
            x, h = upsample(x, size), upsample(h, size)
        h = self.norm1(self.conv0(h), emb)
        h = self.conv1(self.dropout(F.silu(h)))
        x = (h + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        return x if self.attention is None else self.attention(x)


class UNet(nn.Module):
    """`F(x, t, **conditions)` for images.

    An image whose side is no multiple of `patch` is padded by repeating its edge and the result cropped; odd sizes between
    levels are rounded up, so that every size works. The output layer starts at zero: zero velocity before training.

    Shapes: x `(b, channels, h, w)` of unit variance, t `(b,)`, conditions as in `Conditioning`; result like x.

    Raises:
        UserError: for images of another channel count, or a configuration without levels.
    """

    def __init__(self, config: UNetConfig, sigma_data: float = 0.5) -> None:
        super().__init__()
        for name in ("channels", "width", "blocks", "patch"):
            check_setting(getattr(config, name) >= 1, name, getattr(config, name), "at least 1")
        check_setting(
            bool(config.mult) and min(config.mult) >= 1, "mult", config.mult, "one number >= 1 for each level"
        )
        known = all(0 <= level < len(config.mult) for level in config.attention)
        check_setting(known, "attention", config.attention, f"levels from 0 to {len(config.mult) - 1}")
        check_setting(0 <= config.dropout < 1, "dropout", config.dropout, "a number in [0, 1)")
        self.config = config
        self.conditioning = Conditioning(config.conditioning, sigma_data)
        self.takes, self.null = config.conditioning.takes_all, config.conditioning.null
        emb_width = self.conditioning.out_width
        levels = range(len(config.mult))
        widths = [config.width * m for m in config.mult]
        c_data = config.channels * config.patch**2

        def block(c_in: int, c_out: int, level: int, *, down: bool = False, attention: bool | None = None) -> UNetBlock:
            attend = level in config.attention if attention is None else attention
            return UNetBlock(c_in, c_out, emb_width, config.norm, config.dropout, down=down, attention=attend)

        # Encoder: the input convolution, then per level an optional halving and `blocks` blocks. Every output is kept.
        self.inp = nn.Conv2d(c_data, widths[0], 3, padding=1)
        self.encoder = nn.ModuleList()
        kept, c = [widths[0]], widths[0]
        for level in levels:
            if level > 0:
                self.encoder.append(block(c, c, level, down=True, attention=False))
                kept.append(c)
            for _ in range(config.blocks):
                self.encoder.append(block(c, widths[level], level))
                c = widths[level]
                kept.append(c)

        # Middle: two blocks at the coarsest level.
        self.middle = nn.ModuleList([block(c, c, levels[-1]), block(c, c, levels[-1], attention=False)])

        # Decoder: per level `blocks + 1` blocks, each taking one kept output, then a doubling.
        self.decoder = nn.ModuleList()
        self.ups = nn.ModuleList()
        for level in reversed(levels):
            stage = nn.ModuleList()
            for _ in range(config.blocks + 1):
                stage.append(block(c + kept.pop(), widths[level], level))
                c = widths[level]
            self.decoder.append(stage)
            if level > 0:
                self.ups.append(block(c, c, level - 1, attention=False))

        self.out_norm = nn.GroupNorm(norm_groups(c), c)
        self.out = nn.Conv2d(c, c_data, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        zero_bias(self.out)

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.config.channels:
            raise UserError(
                f"images of shape {tuple(x.shape)}; expected (b, {self.config.channels}, h, w); use images with "
                f"{self.config.channels} channels or set network.channels"
            )
        with full_precision(x):
            emb = self.conditioning(t, **conditions)
        h = self.inp(to_patches(x, self.config.patch))
        kept = [h]
        for block in self.encoder:
            h = block(h, emb)
            kept.append(h)
        for block in self.middle:
            h = block(h, emb)
        for i, stage in enumerate(self.decoder):
            for block in stage:  # type: ignore[attr-defined]
                h = block(torch.cat([h, kept.pop()], dim=1), emb)
            if i < len(self.ups):
                h = self.ups[i](h, emb, size=tuple(kept[-1].shape[-2:]))
        h = self.out(F.silu(self.out_norm(h)))
        return from_patches(h, self.config.patch, (x.shape[-2], x.shape[-1]))
