"""Tangent of attention with the whole matrix of weights in memory: the reference, and the fastest for short sequences."""

import math

import torch
from torch import Tensor

from trigflow.tangent.attention.layout import Arguments, arguments


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
    out: Tensor | None = None,
) -> Tensor:
    r"""Derivative of attention from the weights `P` and the change of the scores, both `(..., h, l, s)` in memory::

        do = (P * (dS - rowsum(P * dS))) v + P dv

    Half-precision inputs are computed in float32 and returned in their own dtype.

    Args:
        q: queries `(..., h, l, e)`; the others as for `trigflow.tangent.attention.attention`.
        out: output of the attention if it is known; where it has full precision, one pass over the scores is saved.

    Returns:
        `do`, `(..., h, l, c)`.
    """
    a = arguments(q, k, v, dq, dk, dv, mask, dmask, scale, grouped)
    return whole(a, causal, dropped, out).view(a.shape)


def whole(
    a: Arguments,
    causal: bool,
    dropped: Tensor | None = None,
    out: Tensor | None = None,
    into: Tensor | None = None,
    scratch: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The tangent `(b, h, l, c)` of `attention`, all of its scores in memory.

    `into` may give the memory of the result, and `scratch` that of two matrices of scores `(b h, l, s)`: a caller with many
    blocks keeps both in the cache.
    """
    first, second = scratch or (None, None)
    with torch.autocast(a.q.device.type, enabled=False):
        keys, values, queries = (_matrices(a, t) for t in (a.k, a.v, a.q))
        dkeys, dvalues, dqueries = (None if t is None else _matrices(a, t) for t in (a.dk, a.dv, a.dq))
        full = (*a.q.shape[:3], keys.shape[1])
        shape = torch.Size((*queries.shape[:2], values.shape[2]))
        scores = _product(None, queries, keys.mT, a.scale, first)
        weights = _weights(scores.view(full), a.mask, causal, None if second is None else second.view(full)).flatten(0, 1)
        mixing = weights if dropped is None else dropped.to(a.work).reshape(weights.shape)
        change = None  # takes the memory of the scores, which are done with
        if dqueries is not None:
            change = _product(None, dqueries, keys.mT, a.scale, first)
        if dkeys is not None:
            change = _product(change, queries, dkeys.mT, a.scale, first)
        if a.dmask is not None:
            term = a.dmask.to(a.work)
            change = term.reshape(weights.shape) if change is None else change.view(full).add_(term).flatten(0, 1)
        target = None if into is None or into.dtype != a.work else into.view(shape)
        tangent = None if dvalues is None else _product(None, mixing, dvalues, 1.0, target)
        # A known output may be NaN in rows whose keys are all masked: it serves where no key is.
        seen = dropped is None and a.mask is None and not causal and keys.shape[1] > 0
        if change is not None and seen and out is not None and out.dtype == a.work and out.numel() == shape.numel():
            change = torch.mul(change, weights, out=first)
            inner = change.sum(-1, keepdim=True)
            tangent = _product(tangent, change, values, 1.0, target).addcmul_(inner, out.reshape(shape), value=-1)
        elif change is not None:
            # P * (dS - rowsum(P * dS)), then dropout as in the forward.
            inner = (weights * change).sum(-1, keepdim=True)
            tangent = _product(tangent, torch.sub(change, inner, out=first).mul_(mixing), values, 1.0, target)
        if tangent is None:
            tangent = values.new_zeros(shape)
        tangent = tangent.view(*a.q.shape[:3], values.shape[2])
        return tangent.to(a.q.dtype) if into is None else tangent if target is not None else into.copy_(tangent)


def _matrices(a: Arguments, x: Tensor) -> Tensor:
    """`(b, g, n, m)` as one batch of matrices `(b h, n, m)` in the dtype of the arithmetic."""
    x = x.to(a.work)
    if x.shape[1] != a.q.shape[1]:
        x = x.repeat_interleave(a.q.shape[1] // x.shape[1], 1)
    return x.flatten(0, 1)


def _product(total: Tensor | None, x: Tensor, y: Tensor, scale: float, into: Tensor | None) -> Tensor:
    """`total + scale x y` for batches of matrices, added in place, or `scale x y` (into the memory given)."""
    if total is None:
        return torch.baddbmm(x.new_empty(()), x, y, beta=0, alpha=scale, out=into)
    return total.baddbmm_(x, y, alpha=scale)


def _weights(scores: Tensor, mask: Tensor | None, causal: bool, into: Tensor | None) -> Tensor:
    """Softmax of the scores `(b, h, l, s)`, which are overwritten; zero in rows where every key is masked."""
    if causal:
        rows, columns = scores.shape[-2:]
        seen = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill_(~seen, -math.inf)
    if mask is None:
        return torch.softmax(scores, -1, out=into)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill_(~mask, -math.inf)
    else:
        scores = scores.add_(mask)
    return torch.softmax(scores, -1, out=into).nan_to_num_(0.0)
