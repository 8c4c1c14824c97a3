"""How a network reads words: an encoder of the text, and attention of the picture to it.

Neither depends on the time or on the noisy sample. The tangent of a consistency model passes through the queries of
`CrossAttention` alone; keys, values and the pooled text have none.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trigflow.conditions.text import LENGTHS, TOKENS, tokens
from trigflow.networks.layers import check_setting, largest_divisor, norm_groups, xavier
from trigflow.runtime.errors import UserError

RUNS = (3, 5)
"""Lengths of the runs of bytes that have tables."""


@dataclass(frozen=True)
class TextConfig:
    """What the network reads of a text."""

    length: int = 0
    """Tokens of a text: its bytes and one for the beginning, or the states of another encoder; 0 for a network without words.
    64 where the data have captions and nothing else is said."""
    width: int = 128
    """Features of a token inside the network."""
    depth: int = 2
    """Transformer blocks over the tokens, trained with the network."""
    heads: int = 4
    """Attention heads of these blocks."""
    grams: int = 2039
    """Rows of each table for the runs of 3 and of 5 bytes that end at a byte, which make words known at once; 0 for none."""
    features: int = 0
    """Features of a frozen encoder that are read in place of bytes; 0 for bytes."""

    def __bool__(self) -> bool:
        return self.length != 0

    def check(self) -> None:
        """Raise a UserError for the first setting that makes no sense."""
        fits = LENGTHS[0] <= self.length <= LENGTHS[1]
        check_setting(fits, "conditioning.text.length", self.length, f"{LENGTHS[0]} to {LENGTHS[1]}")
        check_setting(self.width >= 4 and self.width % 4 == 0, "conditioning.text.width", self.width, "a multiple of 4")
        check_setting(self.depth >= 0, "conditioning.text.depth", self.depth, "0 or more")
        fine = self.heads >= 1 and self.width % self.heads == 0
        check_setting(fine, "conditioning.text.heads", self.heads, f"a divisor of the width {self.width}")
        check_setting(self.grams >= 0, "conditioning.text.grams", self.grams, "0 or more")
        check_setting(self.features >= 0, "conditioning.text.features", self.features, "0 or more")

    @property
    def null(self) -> dict[str, Tensor]:
        """The rows that mean "no text": the empty one; of another encoder's features, a single state of zeros."""
        if not self:
            return {}
        row = tokens([""], self.length)[0]
        mask = row > 0
        state = torch.zeros(self.length, self.features, dtype=torch.float32)
        return {"text": state if self.features else row, "text_mask": mask}


class Context(NamedTuple):
    """A text as a network has read it.

    Attributes:
        states: one a token, `(b, n, width)`.
        mask: True for tokens, False for padding, bool `(b, n)`; never all False in a row.
        pooled: mean of the states that are no padding, `(b, width)`.
    """

    states: Tensor
    mask: Tensor
    pooled: Tensor


class TextEncoder(nn.Module):
    """Bytes, or the states of a frozen encoder, into a `Context`::

        h = E[text] + E3[run of 3] + E5[run of 5] + p      (bytes; p sine positions)        h = W text       (features)
        h = h + attention(norm(h), mask);  h = h + mlp(norm(h))         depth times
        states = norm(h)

    A run of bytes is found in its table by its digits in base 257, modulo the rows.

    Shapes: text int64 `(b, n)` or float `(b, n, features)`, mask bool `(b, n)`.

    Source of the tables: Pagnoni et al. 2024 (Byte Latent Transformer), hash n-gram embeddings.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.inp = nn.Linear(config.features, config.width) if config.features else nn.Embedding(TOKENS, config.width)
        tables = len(RUNS) if config.grams and not config.features else 0
        self.grams = nn.ModuleList(nn.Embedding(config.grams, config.width) for _ in range(tables))
        self.blocks = nn.ModuleList(TextBlock(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, text: Tensor, mask: Tensor) -> Context:
        h = self.inp(text)
        if not self.config.features:
            h = h + positions(h.shape[1], h.shape[2], h)
            for length, table in zip(RUNS, self.grams, strict=False):
                run = sum(F.pad(text, (k, 0))[:, : text.shape[1]] * 257**k for k in range(length))
                h = h + table(run % self.config.grams)
        for block in self.blocks:
            h = block(h, mask)
        h = self.norm(h)
        share = mask[:, :, None].to(h.dtype)
        return Context(h, mask, (h * share).sum(1) / share.sum(1))


def read_text(encoder: TextEncoder | None, conditions: Mapping[str, Tensor]) -> Context | None:
    """The text among the conditions as an encoder reads it; where there is none, the empty one. None without an encoder.

    Raises:
        UserError: for a text without its mask, or a mask without its text.
    """
    if encoder is None:
        return None
    given = [name for name in ("text", "text_mask") if name in conditions]
    if len(given) == 1:
        raise UserError(
            f"{given[0]} alone; expected text and text_mask, or neither; pass both, as trigflow.conditions.Text has them"
        )
    if not given:
        device = encoder.norm.weight.device
        conditions = {name: row.to(device)[None] for name, row in encoder.config.null.items()}
    text, mask = conditions["text"], conditions["text_mask"]
    return encoder(text.to(encoder.norm.weight.dtype) if text.is_floating_point() else text, mask)


class TextBlock(nn.Module):
    """Attention among tokens that are no padding, and an MLP, each residual; `(b, n, width)` to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(h)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        h = h + self.proj(y.transpose(1, 2).flatten(2))
        return h + self.linear2(F.gelu(self.linear1(self.norm2(h)), approximate="tanh"))


class CrossAttention(nn.Module):
    """Residual attention of the positions of a feature map to the tokens of a text, `(b, c, ...)` to the same::

        y = (x + W softmax(q k^T / sqrt(d)) v) / sqrt(2)       q of norm(x), k and v of the states that are no padding

    W is not close to zero at the start, as other last layers are: a text that says nothing for long is never learned.
    """

    def __init__(self, channels: int, width: int, head_width: int = 64) -> None:
        super().__init__()
        self.heads = largest_divisor(channels, channels // head_width)
        self.norm = nn.GroupNorm(norm_groups(channels), channels)
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(width, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        xavier(self.proj)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q = self.q(self.norm(x).flatten(2).transpose(1, 2))
        y = self.proj(attend(q, self.kv(context.states), context.mask, self.heads))
        return (x + y.transpose(1, 2).reshape(x.shape)) * math.sqrt(0.5)


def attend(q: Tensor, kv: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Attention of queries `(b, m, c)` to keys and values `(b, n, 2 c)` where the mask `(b, n)` is True; `(b, m, c)`."""
    q = q.unflatten(2, (heads, -1)).transpose(1, 2)
    k, v = kv.unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :]).transpose(1, 2).flatten(2)


def positions(count: int, width: int, like: Tensor) -> Tensor:
    """Sines and cosines of the place of a token, `(count, width)`, with frequencies from 1 to 1/10000."""
    half = width // 2
    frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float32, device=like.device) / half)
    angle = torch.arange(count, dtype=torch.float32, device=like.device)[:, None] * frequencies
    return torch.cat([torch.sin(angle), torch.cos(angle)], dim=1).to(like.dtype)
