"""Layers shared by the networks: adaptive normalization, attention, resampling."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trigflow.runtime.errors import UserError

NormKind = Literal["double", "adagn"]


def check_setting(fine: bool, name: str, value: object, expected: str) -> None:
    """Raise a UserError for a network setting that makes no sense."""
    if not fine:
        raise UserError(f"{name} is {value!r}; expected {expected}; correct the network settings")


def check_at_least_one(config: Any, *names: str) -> None:
    """Raise a UserError for the first of these settings that is below one, or for a dropout outside of [0, 1)."""
    for name in names:
        check_setting(getattr(config, name) >= 1, name, getattr(config, name), "at least 1")
    check_setting(0 <= config.dropout < 1, "dropout", config.dropout, "a number in [0, 1)")


def check_images(x: Tensor, channels: int) -> None:
    """Raise a UserError for what is no batch of images of so many channels."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise UserError(
            f"images of shape {tuple(x.shape)}; expected (b, {channels}, h, w); use images with {channels} channels or set "
            "network.channels"
        )


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """A block in which autocast changes no dtypes, on the device of x (the meta device has no autocast to turn off)."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def pixel_norm(x: Tensor, dim: int = 1, eps: float = 1e-4) -> Tensor:
    """`x / sqrt(mean(x^2) + eps)`, the mean over channels. Source: Karras et al. 2018."""
    return x * torch.rsqrt(x.square().mean(dim=dim, keepdim=True) + eps)


def modulated(y: Tensor, affine: Tensor, double: bool, axis: int = 1) -> Tensor:
    """Normalized features y times a scale plus a shift, which are the halves s and b of `affine`::

        y * pnorm(s) + pnorm(b)     if double
        y * (1 + s) + b             otherwise

    Shapes: y `(b, ..., c, ...)` with its channels at `axis`, affine `(b, 2 c)`; result like y, in its dtype.
    """
    scale, shift = affine.chunk(2, dim=1)
    scale, shift = (pixel_norm(scale), pixel_norm(shift)) if double else (scale + 1, shift)
    shape = [y.shape[0], *[1] * (y.ndim - 1)]
    shape[axis] = y.shape[axis]
    return torch.addcmul(shift.reshape(shape).to(y.dtype), y, scale.reshape(shape).to(y.dtype))


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of a number that is at most so large, or 1."""
    return next(n for n in range(max(1, at_most), 0, -1) if number % n == 0)


def norm_groups(channels: int) -> int:
    """Groups of a group normalization: at most 32, of at least 4 channels each."""
    return largest_divisor(channels, min(32, channels // 4))


def zero_bias(layer: nn.Conv2d | nn.Linear) -> None:
    """Start a layer's bias at zero."""
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def xavier(module: nn.Module) -> None:
    """Uniform weights of variance `2 / (fan_in + fan_out)` and no bias, for linear layers and convolutions."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        zero_bias(module)


class ConditioningLinear(nn.Linear):
    """A linear layer between the conditioning inputs and scales, shifts or gates: in float32 or higher, also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x):
            return super().forward(x)


class AdaptiveNorm(nn.Module):
    """Normalization whose scale and shift come from the conditioning vector.

    ::

        double   y = norm(x) * pnorm(s(emb)) + pnorm(b(emb))      (adaptive double normalization)
        adagn    y = norm(x) * (1 + s(emb)) + b(emb)              (AdaGN)

    with group normalization for `norm` and pixel normalization over channels for `pnorm`. Bounding the modulation bounds
    its time derivative. The modulation is computed in float32 or higher, also under autocast.

    Shapes: x `(b, c, ...)`, emb `(b, e)`. Source: Lu and Song 2025, section 4.1; Dhariwal and Nichol 2021 (AdaGN).
    """

    def __init__(self, channels: int, emb_width: int, kind: NormKind = "double", groups: int | None = None) -> None:
        super().__init__()
        check_setting(kind in get_args(NormKind), "norm", kind, "double or adagn")
        self.kind = kind
        self.groups = groups if groups is not None else norm_groups(channels)
        self.affine = nn.Linear(emb_width, 2 * channels)
        if kind == "double":  # begin near a plain normalization: scale 1, shift of small random direction
            nn.init.ones_(self.affine.bias[:channels])

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        with full_precision(x):
            affine = self.affine(emb)
        return modulated(F.group_norm(x, self.groups), affine, self.kind == "double")


class SelfAttention(nn.Module):
    """Residual multi-head self-attention over the positions of a feature map, `(b, c, h, w)` to the same."""

    def __init__(self, channels: int, head_width: int = 64) -> None:
        super().__init__()
        self.heads = largest_divisor(channels, channels // head_width)
        self.norm = nn.GroupNorm(norm_groups(channels), channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        nn.init.normal_(self.proj.weight, std=1e-5)
        zero_bias(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        # Tokens with their features last, as channels-last images have them: the fused kernels take no other order.
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(b, h * w, c)
        qkv = F.linear(tokens, self.qkv.weight.flatten(1), self.qkv.bias).view(b, h * w, 3, self.heads, c // self.heads)
        q, k, v = qkv.transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(q, k, v)
        y = self.proj(y.transpose(1, 2).reshape(b, h, w, c).permute(0, 3, 1, 2))
        return (x + y) * math.sqrt(0.5)


def downsample(x: Tensor) -> Tensor:
    """Mean over 2x2 cells; an odd last row or column is averaged with what is there. `(b, c, ceil(h/2), ceil(w/2))`."""
    return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Every element becomes a 2x2 cell, cropped to `size` (which `downsample` came from)."""
    y = F.interpolate(x, scale_factor=2.0, mode="nearest")
    return y if tuple(y.shape[-2:]) == tuple(size) else y[..., : size[0], : size[1]]


def to_patches(x: Tensor, patch: int) -> Tensor:
    """Space to depth: each `patch` x `patch` cell of pixels becomes one position, `(b, c patch^2, ceil(h/p), ceil(w/p))`.

    A side that is no multiple of `patch` is padded at its end by repeating the edge.
    """
    if patch == 1:
        return x
    bottom, right = -x.shape[-2] % patch, -x.shape[-1] % patch
    if bottom or right:
        x = F.pad(x, (0, right, 0, bottom), mode="replicate")
    return F.pixel_unshuffle(x, patch)


def from_patches(y: Tensor, patch: int, size: tuple[int, int]) -> Tensor:
    """Inverse of `to_patches` for images of this `size`: what was padded is cut off."""
    if patch == 1:
        return y
    y = F.pixel_shuffle(y, patch)
    return y if tuple(y.shape[-2:]) == tuple(size) else y[..., : size[0], : size[1]]
