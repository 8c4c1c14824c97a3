"""A diffusion transformer with the paper's stabilized conditioning.

After Peebles and Xie 2023 (DiT), with rotary positions and normalized queries and keys, as transformers have had since.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trigflow.networks.embeddings import Conditioning, ConditioningConfig, NetworkConfig
from trigflow.networks.layers import (
    ConditioningLinear,
    check_at_least_one,
    check_images,
    check_setting,
    from_patches,
    modulated,
    pixel_norm,
    to_patches,
    xavier,
    zero_bias,
)
from trigflow.networks.text import Context, attend

DiTNorm = Literal["double", "adaln"]
Positions = Literal["rotary", "sine"]
Words = Literal["cross", "joint"]
Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DiTConfig(NetworkConfig):
    """Configuration of `DiT`. The defaults are size B with patch 2 on latents of 4 channels."""

    axes: ClassVar[int | None] = 3
    reads: ClassVar[bool] = True

    channels: int = 4
    """Image or latent channels."""
    patch: int = 2
    """Side of the pixel block that becomes one token."""
    width: int = 768
    """Features of a token: 384, 768, 1024, 1152 for S, B, L, XL."""
    depth: int = 12
    """Blocks: 12, 12, 24, 28."""
    heads: int = 12
    """Attention heads: 6, 12, 16, 16."""
    mlp_ratio: float = 4.0
    """Width of the hidden layer of a block's MLP, in units of `width`."""
    positions: Positions = "rotary"
    """Rotary embeddings of queries and keys, or sine features added to the tokens; both in two dimensions."""
    qk_norm: bool = True
    """RMS normalization of queries and keys."""
    norm: DiTNorm = "double"
    """Modulation bounded by pixel normalization (as the paper's double normalization), or plain adaLN-Zero."""
    dropout: float = 0.0
    """Dropout inside the blocks, in [0, 1)."""
    words: Words = "cross"
    """How tokens of the picture see those of a text: cross, by attention of their own after the self-attention of a block;
    joint, by passing through the blocks with them."""
    conditioning: ConditioningConfig = field(default_factory=lambda: ConditioningConfig(width=192))
    """Time, label and guidance inputs; `width` is the number of raw time features, a quarter of the conditioning vector."""


SIZES: dict[str, tuple[int, int, int]] = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
"""Width, depth and heads by the names of Peebles and Xie 2023, table 1."""


def dit_config(size: str, patch: int = 2, channels: int = 4, num_classes: int = 0) -> DiTConfig:
    """The configuration of size s, b, l or xl, with a conditioning vector as wide as a token, as published.

    Raises:
        UserError: for another size.
    """
    check_setting(size in SIZES, "DiT size", size, f"one of {', '.join(SIZES)}")
    width, depth, heads = SIZES[size]
    conditioning = ConditioningConfig(width=width // 4, num_classes=num_classes)
    return DiTConfig(channels=channels, patch=patch, width=width, depth=depth, heads=heads, conditioning=conditioning)


class DiT(nn.Module):
    """`F(x, t, **conditions)` for images or latents::

        h = W patches(x)  (+ sine positions)
        h = h + gate1(emb) * attention(norm1(h, emb))
        h = h + gate3(emb) * cross(norm3(h, emb), text)     with a text and words = "cross"
        h = h + gate2(emb) * mlp(norm2(h, emb))             depth times
        F = unpatch(W norm(h, emb))

    With words = "joint" the tokens of a text, after a linear layer, come before those of the picture and pass through the same
    blocks; its padding is attended to by none. The pooled text is part of emb either way.

    Every image size works: one whose side is no multiple of `patch` is padded by repeating its edge and the result cropped.
    The output layer starts at zero: zero velocity before training.

    Shapes: x `(b, channels, h, w)` of unit variance, t `(b,)`, conditions as in `Conditioning`; result like x.

    Raises:
        UserError: for images of another channel count, or a configuration that makes no sense.

    Source: Peebles and Xie 2023 (DiT, adaLN-Zero); Lu and Song 2025, section 4.1 (double normalization).
    """

    def __init__(self, config: DiTConfig, sigma_data: float = 0.5) -> None:
        super().__init__()
        check_config(config)
        self.config = config
        self.conditioning = Conditioning(config.conditioning, sigma_data)
        self.takes, self.null = config.conditioning.takes_all, config.conditioning.null
        emb_width, c_token = self.conditioning.out_width, config.channels * config.patch**2
        self.inp = nn.Linear(c_token, config.width)
        text = config.conditioning.text
        self.text_inp = nn.Linear(text.width, config.width) if text and config.words == "joint" else None
        self.blocks = nn.ModuleList(DiTBlock(config, emb_width) for _ in range(config.depth))
        self.out_norm = TokenNorm(config.width, emb_width, config.norm)
        self.out = nn.Linear(config.width, c_token)
        nn.init.zeros_(self.out.weight)
        zero_bias(self.inp)
        zero_bias(self.out)

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        config = self.config
        check_images(x, config.channels)
        context = self.conditioning.context(conditions)
        emb = self.conditioning(t, context, **conditions)

        # Tokens, row by row.
        cells = to_patches(x, config.patch)
        rows, columns = cells.shape[-2:]
        h = self.inp(cells.flatten(2).transpose(1, 2))
        rotation = None
        if config.positions == "rotary":
            rotation = rotary_positions(rows, columns, config.width // config.heads, emb)
        else:
            h = h + sine_positions(rows, columns, config.width, emb).to(h.dtype)

        mask, before = None, 0
        if self.text_inp is not None and context is not None:  # joint: the text goes before the picture, unrotated
            mask, before = F.pad(context.mask, (0, h.shape[1]), value=True)[:, None, None, :], context.mask.shape[1]
            words = self.text_inp(context.states).to(h.dtype)
            h = torch.cat([words.expand(len(h), -1, -1), h], dim=1)
            if rotation is not None:
                cos, sin = rotation
                rotation = F.pad(cos, (0, 0, before, 0), value=1.0), F.pad(sin, (0, 0, before, 0))
            context = None
        for block in self.blocks:
            h = block(h, emb, rotation, mask=mask, context=context)

        h = h[:, before:]
        h = self.out(self.out_norm(h, emb))
        cells = h.transpose(1, 2).unflatten(2, (rows, columns))
        return from_patches(cells, config.patch, (x.shape[-2], x.shape[-1]))


def check_config(config: DiTConfig) -> None:
    """Raise a UserError for settings that make no sense."""
    check_at_least_one(config, "channels", "patch", "width", "depth", "heads")
    check_setting(config.width % config.heads == 0, "heads", config.heads, f"a divisor of the width {config.width}")
    check_setting(config.mlp_ratio * config.width >= 1, "mlp_ratio", config.mlp_ratio, "a hidden layer of at least 1")
    check_setting(config.positions in get_args(Positions), "positions", config.positions, "rotary or sine")
    check_setting(config.norm in get_args(DiTNorm), "norm", config.norm, "double or adaln")
    check_setting(config.words in get_args(Words), "words", config.words, "cross or joint")
    if config.positions == "rotary":
        fine = config.width // config.heads % 4 == 0
        check_setting(fine, "width / heads", config.width // config.heads, "a multiple of 4 for rotary positions")
    else:
        check_setting(config.width % 4 == 0, "width", config.width, "a multiple of 4 for sine positions")


class DiTBlock(nn.Module):
    """Attention, attention to a text and MLP, each modulated and gated by the conditioning vector; tokens `(b, n, width)` to
    the same. The mask `(b, 1, 1, n)` is True for tokens that are attended to."""

    def __init__(self, config: DiTConfig, emb_width: int) -> None:
        super().__init__()
        width = config.width
        self.norm1 = TokenNorm(width, emb_width, config.norm)
        self.attention = TokenAttention(width, config.heads, config.qk_norm)
        self.gate1 = Gate(width, emb_width, config.norm)
        self.norm2 = TokenNorm(width, emb_width, config.norm)
        self.mlp = TokenMLP(width, round(config.mlp_ratio * width), config.dropout)
        self.gate2 = Gate(width, emb_width, config.norm)
        self.cross: TokenCross | None = None
        if config.conditioning.text and config.words == "cross":
            self.norm3 = TokenNorm(width, emb_width, config.norm)
            self.cross = TokenCross(width, config.heads, config.conditioning.text.width)
            self.gate3 = Gate(width, emb_width, config.norm)

    def forward(
        self, h: Tensor, emb: Tensor, rotation: Rotation | None, mask: Tensor | None = None, context: Context | None = None
    ) -> Tensor:
        h = h + self.gate1(emb).to(h.dtype) * self.attention(self.norm1(h, emb), rotation, mask)
        if self.cross is not None and context is not None:
            h = h + self.gate3(emb).to(h.dtype) * self.cross(self.norm3(h, emb), context)
        return h + self.gate2(emb).to(h.dtype) * self.mlp(self.norm2(h, emb))


class TokenNorm(nn.Module):
    """Layer normalization with scale and shift from the conditioning vector::

        double   y = norm(h) * pnorm(s(emb)) + pnorm(b(emb))      (adaptive double normalization)
        adaln    y = norm(h) * (1 + s(emb)) + b(emb)              (adaLN, s and b zero at the start)

    with pixel normalization over features for `pnorm`. Scale and shift are computed in float32 or higher.

    Shapes: h `(b, n, width)`, emb `(b, e)`. Source: Lu and Song 2025, section 4.1; Peebles and Xie 2023.
    """

    def __init__(self, width: int, emb_width: int, kind: DiTNorm) -> None:
        super().__init__()
        self.kind = kind
        self.affine = ConditioningLinear(emb_width, 2 * width)
        if kind == "double":  # begin near a plain normalization: scale 1, shift of small random direction
            nn.init.ones_(self.affine.bias[:width])
        else:
            nn.init.zeros_(self.affine.weight)
            zero_bias(self.affine)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        return modulated(F.layer_norm(h, h.shape[-1:], eps=1e-6), self.affine(emb), self.kind == "double", axis=2)


class Gate(nn.Module):
    """Factor of a residual branch, zero at the start, so that a block begins as the identity::

        double   g * pnorm(a(emb))     g a learned vector, zero at the start; it bounds the gate's derivative in time
        adaln    a(emb)                weights and bias zero at the start (adaLN-Zero)

    In float32 or higher. Shapes: emb `(b, e)`; result `(b, 1, width)`.
    """

    def __init__(self, width: int, emb_width: int, kind: DiTNorm) -> None:
        super().__init__()
        self.affine = ConditioningLinear(emb_width, width)
        self.gain: nn.Parameter | None = None
        if kind == "double":
            nn.init.ones_(self.affine.bias)
            self.gain = nn.Parameter(torch.zeros(width))
        else:
            nn.init.zeros_(self.affine.weight)
            zero_bias(self.affine)

    def forward(self, emb: Tensor) -> Tensor:
        gate = self.affine(emb)[:, None]
        return gate if self.gain is None else self.gain * pixel_norm(gate, dim=2)


class TokenAttention(nn.Module):
    """Multi-head self-attention of tokens `(b, n, width)`, with RMS-normalized queries and keys.

    Source: Vaswani et al. 2017; Henry et al. 2020 (normalized queries and keys); Su et al. 2021 (rotary positions).
    """

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm = HeadNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(width // heads) if qk_norm else nn.Identity()
        self.apply(xavier)

    def forward(self, y: Tensor, rotation: Rotation | None, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(y).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask)
        return self.proj(y.transpose(1, 2).flatten(2))


class TokenCross(nn.Module):
    """Attention of tokens `(b, n, width)` to those of a text; result like them."""

    def __init__(self, width: int, heads: int, text_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(text_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, y: Tensor, context: Context) -> Tensor:
        return self.proj(attend(self.q(y), self.kv(context.states), context.mask, self.heads))


class HeadNorm(nn.Module):
    """`w x / sqrt(mean(x^2) + eps)` over the features of a head, the last axis, with a learned w."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x, x.shape[-1:], eps=1e-6)
        return y * self.weight.to(y.dtype)


class TokenMLP(nn.Module):
    """`W2 drop(gelu(W1 y))` of each token, `(b, n, width)` to the same."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(hidden, width)
        self.apply(xavier)

    def forward(self, y: Tensor) -> Tensor:
        return self.linear2(self.dropout(F.gelu(self.linear1(y), approximate="tanh")))


# Positions ---------------------------------------------------------------------------------------------------------------


def angles(rows: int, columns: int, count: int, max_period: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """`(row * w_i, column * w_i)` of every token, `w_i = max_period^(-i/count)`; two tensors `(rows * columns, count)`.

    On the device of `like`, in its precision but at least float32.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    i, row, column = (torch.arange(n, dtype=dtype, device=like.device) for n in (count, rows, columns))
    frequencies = torch.exp(i * (-math.log(max_period) / count))
    row, column = row.repeat_interleave(columns), column.repeat(rows)
    return row[:, None] * frequencies, column[:, None] * frequencies


def rotary_positions(rows: int, columns: int, width: int, like: Tensor) -> Rotation:
    """Cosines and sines `(rows * columns, width / 2)` for `rotate`: half of the pairs turn with the row, half with the column.

    Frequencies run from 1 to about 1/100. Source: Su et al. 2021; Heo et al. 2024 (two axes, period 100).
    """
    angle = torch.cat(angles(rows, columns, width // 4, 100.0, like), dim=1)
    return torch.cos(angle), torch.sin(angle)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair of features (i, i + width/2) by its token's angle; x `(b, heads, n, width)` to the same."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def sine_positions(rows: int, columns: int, width: int, like: Tensor) -> Tensor:
    """Sines and cosines of row and column, `(rows * columns, width)`, with frequencies from 1 to about 1/10000."""
    row, column = angles(rows, columns, width // 4, 10_000.0, like)
    return torch.cat([torch.sin(row), torch.cos(row), torch.sin(column), torch.cos(column)], dim=1)
