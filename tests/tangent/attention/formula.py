"""Attention written out in plain functions: the oracle of the attention tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def written_out(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """`softmax(scale q k^T + mask) v`, heads of k and v repeated where q has more."""
    k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) if q.ndim > 2 else t for t in (k, v))
    s = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if causal:
        s = s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask
    return torch.softmax(s, -1) @ v
