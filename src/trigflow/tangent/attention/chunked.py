"""Tangent of attention in memory linear in the sequence length: the scores exist one block at a time."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trigflow.tangent.attention.layout import Arguments, four_axes
from trigflow.tangent.attention.plain import whole

BLOCKS = {"cpu": 1 << 19}
"""Numbers in a block of scores by kind of device: few enough for the cache of a processor, many for an accelerator."""
BLOCK = 1 << 23


def attention(a: Arguments, causal: bool = False, out: Tensor | None = None, block: int | None = None) -> Tensor:
    r"""Derivative of attention, block of queries by block of queries, with sums over blocks of keys.

    With `m` the largest score of a row so far, each row keeps::

        sum exp(S - m),   sum exp(S - m) v,   sum exp(S - m) dS,   sum exp(S - m) (dS v + dv)

    and multiplies them by `exp(m - m')` whenever a block raises the largest score to `m'` (online softmax; Milakov and
    Gimelshein, 2018). Beside its result, each block of rows needs memory for a few blocks of scores. Entries of the batch
    whose scores all fit into one block are computed as `plain` does.

    Args:
        a: queries, keys and values, their tangents, masks.
        causal: let query i see keys 0..i only.
        out: output of the attention if it is known; used in place of the second sum where it has full precision.
        block: numbers in a block of scores.

    Returns:
        `do`, `(..., h, l, c)`.
    """
    device = a.q.device
    with torch.autocast(device.type, enabled=False):
        known = out if out is not None and out.dtype == a.work and out.shape == a.shape else None
        known = None if known is None else four_axes(known, known.shape[:-3])
        tangent = torch.empty((*a.q.shape[:3], a.v.shape[3]), dtype=a.q.dtype, device=device)
        if all(t is None for t in (a.dq, a.dk, a.dv, a.dmask)):
            tangent.zero_()
        elif tangent.numel():
            batch, rows, columns = block_shape(a, block or BLOCKS.get(device.type, BLOCK))
            one_block = rows == a.q.shape[2] and columns == a.k.shape[2]
            scores = (batch * a.q.shape[1], rows, columns)
            scratch = [torch.empty(scores if one_block else (0,), dtype=a.work, device=device) for _ in range(2)]
            for first in range(0, a.q.shape[0], batch):
                part = slice(first, first + batch)
                if one_block:
                    _entries(a, known, part, causal, tangent[part], scratch)
                    continue
                for start in range(0, a.q.shape[2], rows):
                    tangent[part, :, start : start + rows] = _rows(a, known, part, start, rows, columns, causal)
        return tangent.view(a.shape)


def block_shape(a: Arguments, size: int) -> tuple[int, int, int]:
    """Batch entries, queries and keys of a block of at most about `size` scores, all heads included.

    Many entries are as many for each thread of the CPU.
    """
    batch, heads, rows, _ = a.q.shape
    columns = max(1, min(a.k.shape[2], 512, max(16, size // 16)))
    rows = min(rows, max(16, size // (heads * columns)))
    entries = min(batch, max(1, size // (heads * rows * columns)))
    threads = torch.get_num_threads() if a.q.device.type == "cpu" else 1
    return entries - entries % threads or entries, rows, columns


def _entries(a: Arguments, known: Tensor | None, part: slice, causal: bool, into: Tensor, scratch: list[Tensor]) -> None:
    """The tangent of some entries of the batch, where all of their scores make one block, which `scratch` has room for."""
    names = ("q", "k", "v", "dq", "dk", "dv", "mask", "dmask")
    tensors = {name: getattr(a, name) for name in names}
    chosen: dict[str, Any] = {name: None if t is None else t[part] for name, t in tensors.items()}
    entries = replace(a, **chosen)
    first, second = (s[: entries.q.shape[0] * entries.q.shape[1]] for s in scratch)
    whole(entries, causal, out=None if known is None else known[part], into=into, scratch=(first, second))


def _rows(a: Arguments, known: Tensor | None, part: slice, start: int, rows: int, columns: int, causal: bool) -> Tensor:
    """The tangent of queries `start` to `start + rows` of some entries of the batch."""
    stop, keys = min(start + rows, a.q.shape[2]), a.k.shape[2]
    q = a.q[part, :, start:stop].to(a.work) * a.scale
    dq = None if a.dq is None else a.dq[part, :, start:stop].to(a.work) * a.scale
    # dS = [dq, q] [k, dk]^T, one product for both terms.
    left = [t for t in (dq, None if a.dk is None else q) if t is not None]
    left = [torch.cat(left, -1)] if len(left) == 2 else left

    masked = causal or a.mask is not None or keys == 0  # else no row is without a key
    top = q.new_full((*q.shape[:3], 1), -math.inf)
    total, inner = torch.zeros_like(top), torch.zeros_like(top)
    moved = q.new_zeros(*q.shape[:3], a.v.shape[3])
    output = torch.zeros_like(moved)
    for first in range(0, min(stop, keys) if causal else keys, columns):
        last = min(first + columns, keys)
        k, v = (t[part, :, first:last].to(a.work) for t in (a.k, a.v))
        scores = _times(q, k.mT)
        if causal and last > start + 1:
            seen = torch.ones(stop - start, last - first, dtype=torch.bool, device=q.device).tril(start - first)
            scores.masked_fill_(~seen, -math.inf)
        if a.mask is not None:
            mask = a.mask[part, :, start:stop, first:last]
            scores = scores.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else scores.add_(mask)
        before, top = top, torch.maximum(top, scores.amax(-1, keepdim=True))
        level = top.masked_fill(top == -math.inf, 0.0) if masked else top
        weights = scores.sub_(level).exp_()
        fade = before.sub_(level).exp_()
        total.mul_(fade).add_(weights.sum(-1, keepdim=True))
        moved.mul_(fade)
        change = None
        if left:
            dk = None if a.dk is None else a.dk[part, :, first:last].to(a.work)
            right = [t for t in (None if dq is None else k, dk) if t is not None]
            change = _times(left[0], torch.cat(right, -1).mT)
        if a.dmask is not None:
            term = a.dmask[part, :, start:stop, first:last].to(a.work)
            change = term if change is None else change.add_(term)
        if change is not None:
            weighted = weights * change
            inner.mul_(fade).add_(weighted.sum(-1, keepdim=True))
            moved.add_(_times(weighted, v))
            if known is None:
                output.mul_(fade).add_(_times(weights, v))
        if a.dv is not None:
            moved.add_(_times(weights, a.dv[part, :, first:last].to(a.work)))
    nothing = total == 0 if masked else None
    if nothing is not None:
        total.masked_fill_(nothing, 1.0)
    if known is None:
        moved.addcmul_(inner, output.div_(total), value=-1)
    else:
        moved.addcmul_(inner, known[part, :, start:stop], value=-1)
    moved.div_(total)
    return moved if nothing is None else moved.masked_fill_(nothing, 0.0)


def _times(x: Tensor, y: Tensor) -> Tensor:
    """Product of `(b, h, rows, n)` and `(b, g, n, m)`, each head of `y` serving `h / g` neighbouring heads of `x`."""
    b, h, rows, n = x.shape
    return (x.reshape(b, y.shape[1], -1, n) @ y).view(b, h, rows, y.shape[3])
