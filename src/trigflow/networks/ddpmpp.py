"""The DDPM++ U-Net that EDM published for CIFAR-10, with the paper's changes as switches.

After Song et al. 2021 (DDPM++) in the form of Karras et al. 2022 (EDM). Parameters carry the published names
(`model.enc.32x32_conv.weight`, ...), so the published weights load as they are. In the published form (`norm="add"`,
`time_map="log"`) the network is EDM's raw `F_edm(c_in x, c_noise)`, of the opposite sign to a TrigFlow network.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trigflow.conditions import check_told
from trigflow.networks.embeddings import (
    EMBEDDINGS,
    ConditioningConfig,
    FourierEmbedding,
    NetworkConfig,
    PositionalEmbedding,
    c_noise,
    check_conditioning,
    one_hot,
)
from trigflow.networks.layers import (
    ConditioningLinear,
    check_images,
    check_setting,
    full_precision,
    modulated,
    norm_groups,
    xavier,
)
from trigflow.networks.levels import ResidualBlock, check_levels, steps
from trigflow.networks.text import Context
from trigflow.runtime.errors import UserError

DDPMPPNorm = Literal["add", "adagn", "double"]


@dataclass(frozen=True)
class DDPMPPConfig(NetworkConfig):
    """Configuration of `DDPMPP`. The defaults are the paper's CIFAR-10 network."""

    axes: ClassVar[int | None] = 3

    channels: int = 3
    """Image channels."""
    resolution: int = 32
    """Side of the images, from which levels and parameters take their names."""
    width: int = 128
    """Feature channels before the multipliers."""
    mult: tuple[int, ...] = (2, 2, 2)
    """Channel multiplier of each level; each level after the first halves the resolution."""
    blocks: int = 4
    """Residual blocks per level (the decoder has one more)."""
    attention: tuple[int, ...] = (16,)
    """Resolutions with self-attention: in every block of the encoder, in the last of the decoder; others are ignored."""
    norm: DDPMPPNorm = "double"
    """The embedding added to the features (as published), AdaGN, or adaptive double normalization."""
    augment: int = 0
    """Width of the augmentation label (9 as published), given as zeros when there is no augmentation."""
    dropout: float = 0.0
    """Dropout inside the blocks, in [0, 1)."""
    conditioning: ConditioningConfig = field(default_factory=lambda: ConditioningConfig(width=128))
    """Time, label, guidance and end inputs; `width` is the number of raw time features (as published: that of the network)."""


class DDPMPP(nn.Module):
    """`F(x, t, **conditions)` for images.

    Made for images of side `resolution`, which names the levels; other sizes work, odd ones between levels rounded up. The
    output layer starts at zero: zero velocity before training.

    Shapes: x `(b, channels, h, w)` of unit variance, t `(b,)`, conditions as in `Conditioning`, augment `(b, config.augment)`;
    result like x.

    Raises:
        UserError: for images of another channel count, conditions or augmentation that the network does not take or misses, or
            a configuration that makes no sense.
    """

    def __init__(self, config: DDPMPPConfig, sigma_data: float = 0.5) -> None:
        super().__init__()
        check_conditioning(config.conditioning)
        check_levels(config)
        smallest = 2 ** (len(config.mult) - 1)
        expected = f"at least {smallest}, to be halved {len(config.mult) - 1} times"
        check_setting(config.resolution >= smallest, "resolution", config.resolution, expected)
        check_setting(config.norm in get_args(DDPMPPNorm), "norm", config.norm, "add, adagn or double")
        check_setting(config.augment >= 0, "augment", config.augment, "0 or more")
        features = config.conditioning.width
        check_setting(features >= 4, "conditioning.width", features, "an even number >= 4")
        self.config = config
        self.sigma_data = sigma_data
        self.takes, self.null = config.conditioning.takes_all, config.conditioning.null
        self.model = DDPMPPBody(config)
        for name in config.conditioning.takes:
            module, embedding = EMBEDDINGS[name]
            self.add_module(module, embedding(features))

    def forward(self, x: Tensor, t: Tensor, *, augment: Tensor | None = None, **conditions: Tensor) -> Tensor:
        check_images(x, self.config.channels)
        check_told(self, conditions)
        if augment is not None and augment.shape != (x.shape[0], self.config.augment):
            raise UserError(
                f"augmentation labels of shape {tuple(augment.shape)}; expected ({x.shape[0]}, {self.config.augment}); "
                "drop them or set network.augment"
            )
        with full_precision(x):
            noise = c_noise(t, self.config.conditioning.time_map, self.sigma_data)
            told = None
            for name in self.config.conditioning.takes:
                one = getattr(self, EMBEDDINGS[name][0])(t, conditions[name])
                told = one if told is None else told + one
            emb = self.model.embed(noise, conditions.get("label"), augment, told)
        return self.model(x, emb)


class DDPMPPBody(nn.Module):
    """The U-Net of `DDPMPP`, whose parts carry the published names."""

    def __init__(self, config: DDPMPPConfig) -> None:
        super().__init__()
        conditioning = config.conditioning
        features, emb_width, classes = conditioning.width, 4 * config.width, conditioning.num_classes

        # Embedding: time, class and augmentation features, summed, then two linear layers.
        self.map_noise: nn.Module
        if conditioning.time_embedding == "positional":
            self.map_noise = PositionalEmbedding(features, endpoint=True)
        else:
            self.map_noise = FourierEmbedding(features, conditioning.fourier_scale)
        self.map_label = ConditioningLinear(classes, features) if classes else None
        self.map_augment = ConditioningLinear(config.augment, features, bias=False) if config.augment else None
        self.map_layer0 = ConditioningLinear(features, emb_width)
        self.map_layer1 = ConditioningLinear(emb_width, emb_width)

        self.enc = nn.ModuleDict()
        self.dec = nn.ModuleDict()
        side = config.resolution
        self.enc[f"{side}x{side}_conv"] = nn.Conv2d(config.channels, config.width, 3, padding=1)
        for step in steps(config.width, [config.width * m for m in config.mult], config.blocks):
            kind, level, number, c_in, c = step
            resample = kind if kind in ("down", "up") else None
            last = kind == "encoder" or (kind == "decoder" and number == config.blocks)
            attends = kind == "in0" or (last and side >> level in config.attention)
            block = DDPMPPBlock(c_in, c, emb_width, config.norm, config.dropout, resample, attends)
            (self.enc if kind in ("encoder", "down") else self.dec)[step.name(side)] = block
        self.aux = f"{side}x{side}_aux"
        self.dec[f"{self.aux}_norm"] = group_norm(c)
        self.dec[f"{self.aux}_conv"] = nn.Conv2d(c, config.channels, 3, padding=1)

        self.apply(xavier)
        for module in self.modules():
            if isinstance(module, DDPMPPBlock):
                module.start_small()
        nn.init.zeros_(self.dec[f"{self.aux}_conv"].weight)  # type: ignore[arg-type]

    def embed(self, noise: Tensor, label: Tensor | None, augment: Tensor | None, told: Tensor | None) -> Tensor:
        """The conditioning vector `(b, 4 width)`; `told` is the embedding `(b, features)` of guidance and end."""
        cosines, sines = self.map_noise(noise).chunk(2, dim=1)
        emb = torch.cat([sines, cosines], dim=1)
        if self.map_label is not None:
            emb = emb + self.map_label(one_hot(label, emb, self.map_label.in_features))
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment)
        if told is not None:
            emb = emb + told
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        kept: list[Tensor] = []
        h = x
        for layer in self.enc.values():
            h = layer(h, emb) if isinstance(layer, DDPMPPBlock) else layer(h)
            kept.append(h)
        for name, layer in self.dec.items():
            if "_block" in name:
                h = layer(torch.cat([h, kept.pop()], dim=1), emb)
            elif "_up" in name:
                h = layer(h, emb, (kept[-1].shape[-2], kept[-1].shape[-1]))
            elif "_in" in name:
                h = layer(h, emb)
        h = F.silu(self.dec[f"{self.aux}_norm"](h))
        return self.dec[f"{self.aux}_conv"](h)


class DDPMPPBlock(ResidualBlock):
    """A `ResidualBlock`, and self-attention after it where asked for::

        add      condition(h, emb) = norm1(h + a(emb))
        adagn    condition(h, emb) = norm1(h) * (1 + s(emb)) + b(emb)
        double   condition(h, emb) = norm1(h) * pnorm(s(emb)) + pnorm(b(emb))

        x <- (x + attention(norm2(x))) / sqrt(2)

    `affine` computes a, or s and b, in float32 or higher. Attention has one head and runs in float32 or higher too.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        emb_width: int,
        norm: DDPMPPNorm,
        dropout: float,
        resample: Literal["down", "up"] | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.c_out, self.norm, self.attention, self.down = c_out, norm, attention, resample == "down"
        self.norm0 = group_norm(c_in)
        self.conv0 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.affine = ConditioningLinear(emb_width, c_out if norm == "add" else 2 * c_out)
        self.norm1 = group_norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if resample or c_in != c_out else None
        if resample and self.skip is not None:  # part of the published weights: the mean over 2x2 cells
            for layer in (self.conv0, self.skip):
                layer.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))
        if attention:
            self.norm2 = group_norm(c_out)
            self.qkv = nn.Conv2d(c_out, 3 * c_out, 1)
            self.proj = nn.Conv2d(c_out, c_out, 1)

    def start_small(self) -> None:
        """Weights, after `xavier`, with which the block begins close to its skip connection."""
        with torch.no_grad():
            self.conv1.weight.mul_(1e-5)
            if self.attention:
                self.qkv.weight.mul_(math.sqrt(0.2))
                self.proj.weight.mul_(1e-5)
            if self.norm == "double":  # near a plain normalization: scale 1, shift of small random direction
                self.affine.bias[: self.c_out] = 1.0

    def condition(self, h: Tensor, emb: Tensor) -> Tensor:
        return self.modulate(h, self.affine(emb))

    def modulate(self, h: Tensor, affine: Tensor) -> Tensor:
        """`norm1` and the conditioning; affine `(b, c_out)` or, scale and shift, `(b, 2 c_out)`."""
        if self.norm == "add":
            return self.norm1(h + affine[:, :, None, None].to(h.dtype))
        return modulated(self.norm1(h), affine, self.norm == "double")

    def attend(self, x: Tensor, context: Context | None) -> Tensor:
        """Self-attention over positions; queries, keys and values alternate in the channels of `qkv`."""
        if not self.attention:
            return x
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm2(x)).reshape(b, 1, c, 3, h * w)
        with full_precision(x):
            q, k, v = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).transpose(2, 4).unbind(3)
            y = F.scaled_dot_product_attention(q, k, v)
        return (x + self.proj(y.transpose(2, 3).reshape(b, c, h, w).to(x.dtype))) * math.sqrt(0.5)


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalization with groups of at least 4 channels, at most 32 of them."""
    return nn.GroupNorm(norm_groups(channels), channels, eps=1e-6)
