"""The networks that are timed: the library's U-Net and a diffusion transformer, unmodified modules both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trigflow.networks import ConditioningConfig, UNet, UNetConfig


class DiTBlock(nn.Module):
    """Self-attention and a two-layer network, each scaled, shifted and gated by the embedding.

    ::

        x = x + g1 * attention((1 + s1) * norm(x) + b1)
        x = x + g2 * mlp((1 + s2) * norm(x) + b2),      (s1, b1, g1, s2, b2, g2) = W silu(emb)

    Shapes: x `(b, n, width)`, emb `(b, width)`.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        s1, b1, g1, s2, b2, g2 = self.modulation(emb)[:, None].chunk(6, dim=-1)
        x = x + g1 * self.attend(self.norm1(x) * (1 + s1) + b1)
        return x + g2 * self.mlp(self.norm2(x) * (1 + s2) + b2)

    def attend(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width))


class DiT(nn.Module):
    """Diffusion transformer: patches of 2x2 pixels, learned positions, blocks conditioned on time by adaptive layer norm.

    Shapes: x `(b, channels, side, side)`, t `(b,)`; result like x. Source: Peebles and Xie 2023.
    """

    frequencies: Tensor

    def __init__(self, channels: int, side: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.grid = side // 2
        self.patches = nn.Conv2d(channels, width, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(1, self.grid**2, width))
        self.register_buffer("frequencies", torch.exp(-math.log(10_000) * torch.arange(128) / 128))
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.out = nn.Linear(width, 4 * channels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None] * self.frequencies
        emb = self.time(torch.cat([angle.cos(), angle.sin()], dim=1))
        h = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            h = block(h, emb)
        scale, shift = self.modulation(emb)[:, None].chunk(2, dim=-1)
        h = self.out(self.norm(h) * (1 + scale) + shift)
        return F.pixel_shuffle(h.transpose(1, 2).unflatten(2, (self.grid, self.grid)), 2)


@dataclass(frozen=True)
class Case:
    """One network at one batch size."""

    name: str
    what: str
    """For the reader of the table."""
    make: Callable[[], nn.Module]
    shape: tuple[int, int, int, int]
    """Of the batch of images, `(b, c, h, w)`."""
    cuda: bool = False
    """Too large for a CPU: run on CUDA only, under bfloat16 autocast."""

    def build(self) -> nn.Module:
        """The network with every weight moved off its start, so that no layer is zero and no gradient vanishes."""
        torch.manual_seed(0)
        net = self.make()
        with torch.no_grad():
            for weight in net.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.02)
        return net


def unet(channels: int, width: int, blocks: int) -> Callable[[], nn.Module]:
    """Two levels, self-attention on the coarser one, adaptive double normalization."""
    conditioning = ConditioningConfig(width=32)
    config = UNetConfig(channels=channels, width=width, mult=(1, 2), blocks=blocks, attention=(1,), conditioning=conditioning)
    return lambda: UNet(config)


def dit(channels: int, side: int, width: int, depth: int) -> Callable[[], nn.Module]:
    """Heads of 64."""
    return lambda: DiT(channels, side, width, depth, max(1, width // 64))


NAMED = "unet-1m"
"""The case for which the bars are stated."""

CASES = {
    case.name: case
    for case in (
        Case("unet-small", "U-Net, width 16, batch 64 of 28x28", unet(1, 16, 1), (64, 1, 28, 28)),
        Case(NAMED, "U-Net, width 32, batch 64 of 28x28", unet(1, 32, 2), (64, 1, 28, 28)),
        Case("unet-large", "U-Net, width 64, batch 16 of 32x32", unet(3, 64, 2), (16, 3, 32, 32)),
        Case("dit-small", "DiT, width 64, depth 4, batch 32 of 28x28", dit(1, 28, 64, 4), (32, 1, 28, 28)),
        Case("dit-medium", "DiT, width 192, depth 6, batch 16 of 28x28", dit(1, 28, 192, 6), (16, 1, 28, 28)),
        Case("dit-large", "DiT-S/2, batch 4 of 4x32x32", dit(4, 32, 384, 12), (4, 4, 32, 32)),
        Case("unet-cuda", "U-Net, width 128, batch 64 of 32x32", unet(3, 128, 3), (64, 3, 32, 32), cuda=True),
        Case("dit-cuda", "DiT-B/2, batch 64 of 4x32x32", dit(4, 32, 768, 12), (64, 4, 32, 32), cuda=True),
    )
}

TINY = {
    case.name: case
    for case in (
        Case(NAMED, "U-Net, width 8, batch 2 of 8x8", unet(1, 8, 1), (2, 1, 8, 8)),
        Case("dit-small", "DiT, width 16, depth 1, batch 2 of 8x8", dit(1, 8, 16, 1), (2, 1, 8, 8)),
    )
}
"""Sizes that only show that everything runs."""
