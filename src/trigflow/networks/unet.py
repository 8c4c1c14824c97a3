"""A DDPM++-style U-Net for images of any channel count and size.

After Song et al. 2021 (DDPM++) as used by Karras et al. 2022, with the changes of Lu and Song 2025, section 4.1, each a
switch: identity time, positional embedding, adaptive double normalization. `patch > 1` moves the whole U-Net to a coarser
grid (space to depth), which is what makes small images cheap on a CPU.
"""

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
    check_images,
    check_setting,
    from_patches,
    norm_groups,
    to_patches,
    zero_bias,
)
from trigflow.networks.levels import ResidualBlock, check_levels, steps
from trigflow.networks.text import Context, CrossAttention


@dataclass(frozen=True)
class UNetConfig(NetworkConfig):
    """Configuration of `UNet`."""

    axes: ClassVar[int | None] = 3
    reads: ClassVar[bool] = True

    channels: int = 1
    """Image channels."""
    width: int = 64
    """Feature channels at the first level."""
    mult: tuple[int, ...] = (1, 2)
    """Channel multiplier of each level; each level after the first halves the resolution."""
    blocks: int = 2
    """Residual blocks per level (the decoder has one more)."""
    attention: tuple[int, ...] = ()
    """Levels (0 is the finest) whose blocks are followed by self-attention, and by attention to a text."""
    patch: int = 1
    """Side of the pixel block that becomes one position."""
    norm: NormKind = "double"
    """Adaptive double normalization, or AdaGN."""
    dropout: float = 0.0
    """Dropout inside the blocks, in [0, 1)."""
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)


class UNetBlock(ResidualBlock):
    """The residual block of `UNet`, with an `AdaptiveNorm` for its conditioning; shapes as in `ResidualBlock`."""

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
        text_width: int = 0,
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
        self.cross = CrossAttention(c_out, text_width) if attention and text_width else None

    def condition(self, h: Tensor, emb: Tensor) -> Tensor:
        return self.norm1(h, emb)

    def attend(self, x: Tensor, context: Context | None) -> Tensor:
        x = x if self.attention is None else self.attention(x)
        return x if self.cross is None or context is None else self.cross(x, context)


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
        check_levels(config)
        check_setting(config.patch >= 1, "patch", config.patch, "at least 1")
        known = all(0 <= level < len(config.mult) for level in config.attention)
        check_setting(known, "attention", config.attention, f"levels from 0 to {len(config.mult) - 1}")
        self.config = config
        self.conditioning = Conditioning(config.conditioning, sigma_data)
        self.takes, self.null = config.conditioning.takes_all, config.conditioning.null
        text_width = config.conditioning.text.width if config.conditioning.text else 0
        widths = [config.width * m for m in config.mult]
        c_data = config.channels * config.patch**2
        self.inp = nn.Conv2d(c_data, widths[0], 3, padding=1)
        self.encoder = nn.ModuleList()
        self.middle = nn.ModuleList()
        self.decoder = nn.ModuleList()
        self.ups = nn.ModuleList()
        for kind, level, number, c_in, c in steps(widths[0], widths, config.blocks):
            attends = level in config.attention and kind in ("encoder", "in0", "decoder")
            emb_width, down = self.conditioning.out_width, kind == "down"
            block = UNetBlock(
                c_in, c, emb_width, config.norm, config.dropout, down=down, attention=attends, text_width=text_width
            )
            if kind == "decoder":
                if number == 0:
                    self.decoder.append(nn.ModuleList())
                self.decoder[-1].append(block)  # type: ignore[operator]
            else:
                {"in0": self.middle, "in1": self.middle, "up": self.ups}.get(kind, self.encoder).append(block)

        self.out_norm = nn.GroupNorm(norm_groups(c), c)
        self.out = nn.Conv2d(c, c_data, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        zero_bias(self.out)

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        check_images(x, self.config.channels)
        context = self.conditioning.context(conditions)
        emb = self.conditioning(t, context, **conditions)
        h = self.inp(to_patches(x, self.config.patch))
        kept = [h]
        for block in self.encoder:
            h = block(h, emb, context=context)
            kept.append(h)
        for block in self.middle:
            h = block(h, emb, context=context)
        for i, stage in enumerate(self.decoder):
            for block in stage:  # type: ignore[attr-defined]
                h = block(torch.cat([h, kept.pop()], dim=1), emb, context=context)
            if i < len(self.ups):
                h = self.ups[i](h, emb, size=tuple(kept[-1].shape[-2:]))
        h = self.out(F.silu(self.out_norm(h)))
        return from_patches(h, self.config.patch, (x.shape[-2], x.shape[-1]))
