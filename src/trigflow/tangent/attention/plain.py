"""Tangent of attention with the whole matrix of weights in memory: the reference, and the fastest for short sequences."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    *,
    mask: Tensor | None = None,
    dmask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    grouped: bool = False,
    dropped: Tensor | None = None,
) -> Tensor:
    r"""Derivative of attention from the weights `P` and the change of the scores, both `(..., h, l, s)` in memory::

        do = (P * (dS - rowsum(P * dS))) v + P dv

    Half-precision inputs are computed in float32 and returned in their own dtype.

    Args:
        q: queries `(..., h, l, e)`; the others as for `trigflow.tangent.attention.attention`.

    Returns:
        `do`, `(..., h, l, c)`.
    """
    dtype = q.dtype
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        work = torch.promote_types(dtype, torch.float32)
        q, k, v = q.to(work), k.to(work), v.to(work)
        dq, dk, dv = (None if t is None else t.to(work) for t in (dq, dk, dv))
        if grouped and k.shape[-3] != q.shape[-3]:
            repeats = q.shape[-3] // k.shape[-3]
            k, v = k.repeat_interleave(repeats, -3), v.repeat_interleave(repeats, -3)
            dk, dv = (None if t is None else t.repeat_interleave(repeats, -3) for t in (dk, dv))
        weights = _weights(q * scale, k, mask, causal)
        if dropped is None:
            dropped = weights
        change = None
        if dq is not None:
            change = (dq * scale) @ k.mT
        if dk is not None:
            term = (q * scale) @ dk.mT
            change = term if change is None else change.add_(term)
        if dmask is not None:
            term = dmask.to(work)
            change = term.expand(weights.shape) if change is None else change.add_(term)
        out = None
        if change is not None:
            # P * (dS - rowsum(P * dS)), then dropout as in the forward.
            inner = (weights * change).sum(-1, keepdim=True)
            out = ((change - inner).mul_(dropped)) @ v
        if dv is not None:
            term = dropped @ dv
            out = term if out is None else out.add_(term)
        if out is None:
            out = torch.zeros((*q.shape[:-1], v.shape[-1]), dtype=work, device=q.device)
        return out.to(dtype)


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Softmax of the scores of scaled queries; zero in rows where every key is masked."""
    scores = q @ k.mT
    if causal:
        rows, columns = scores.shape[-2:]
        seen = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill_(~seen, -math.inf)
    if mask is None:
        return torch.softmax(scores, -1)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill_(~mask, -math.inf)
    else:
        scores = scores.add_(mask)
    return torch.softmax(scores, -1).nan_to_num_(0.0)
