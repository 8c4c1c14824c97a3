# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Gradients of attention by a Triton kernel, which computes the weights again from the log-sum-exp of the scores."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trigflow.tangent.attention.layout import Arguments
from trigflow.tangent.attention.triton import LOG2_E, _at, _dot, _lines, _seen, _visit, launch, masking, unit_stride


@triton.jit
def _sums(lse, delta, i, rows):
    """For queries i the log-sum-exp to the base 2, 0 where no key is seen (all scores are -inf there), and `rowsum(g * o)`."""
    level = tl.load(lse + i, mask=i < rows, other=0.0) * LOG2_E
    return tl.where(level == float("-inf"), 0.0, level), tl.load(delta + i, mask=i < rows, other=0.0)


@triton.jit
def kernel(tensors, strides, numbers, FORM: tl.constexpr):
    """One program computes a tile of the gradient of queries, or with `FORM.ACROSS` of the gradients of keys and values.

    `x` and `y` are what the tile belongs to, queries and g or keys and values; `p` and `q` are the other two, tile by tile,
    from `turns` heads. The first also stores `delta`, which the second needs.
    """
    ACROSS: tl.constexpr = FORM.ACROSS
    OWN: tl.constexpr = FORM.COLUMNS if ACROSS else FORM.ROWS
    OTHER: tl.constexpr = FORM.ROWS if ACROSS else FORM.COLUMNS
    WIDE_E: tl.constexpr = FORM.WIDE_E
    WIDE_C: tl.constexpr = FORM.WIDE_C
    x, y, p, q, mask, lists, x_out, last, lse, delta = tensors  # last: output of the attention, or gradient of the values
    x_s, y_s, p_s, q_s, mask_s, lists_s, x_out_s, last_s = strides
    heads, turns, repeats, own, other, scale = numbers
    blocks = tl.cdiv(own, OWN)
    block, item = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    if FORM.CAUSAL and not ACROSS:
        block = blocks - 1 - block  # the rows that see most keys start first
    batch, head = (item // heads).to(tl.int64), (item % heads).to(tl.int64)

    m = block * OWN + tl.arange(0, OWN)
    x = _lines(_at(x, x_s, batch, head), m, x_s[2], own, FORM.E, WIDE_E, not FORM.EVEN)
    y = _lines(_at(y, y_s, batch, head), m, y_s[2], own, FORM.C, WIDE_C, not FORM.EVEN)
    c = tl.arange(0, WIDE_C)
    last = _at(last, last_s, batch, head) + m[:, None] * last_s[2] + c[None, :]
    inside = (m[:, None] < own) & (c[None, :] < FORM.C)
    if not ACROSS:
        lse += (batch * heads + head) * own
        delta += (batch * heads + head) * own
        inner = tl.sum(y.to(tl.float32) * tl.load(last, mask=inside, other=0.0).to(tl.float32), 1)
        tl.store(delta + m, inner, mask=m < own)
        level = _sums(lse, delta, m, own)[0]
    nothing = tl.zeros([OWN, OTHER], tl.float32)
    x_sum = tl.zeros([OWN, WIDE_E], tl.float32)
    y_sum = tl.zeros([OWN, WIDE_C], tl.float32)
    for turn in range(turns):
        away = head // repeats * turns + turn
        queries = batch * heads * turns + away  # of all batches, with ACROSS
        low, high = 0, other
        if FORM.CAUSAL:
            if ACROSS:
                low = block * OWN // OTHER * OTHER
            else:
                high = tl.minimum(other, (block + 1) * OWN)
        p_head, q_head, masks, visits = _at(p, p_s, batch, away), _at(q, q_s, batch, away), mask, lists
        if FORM.MASK != "none":
            masks = _at(mask, mask_s, batch, away if ACROSS else head)
        if FORM.TABLE:
            visits = _at(lists, lists_s, batch, away if ACROSS else head) + block * OWN // FORM.BLOCK * lists_s[2]
            low, high = 0, tl.load(visits) * FORM.BLOCK
        for at in range(low, high, OTHER):
            first, entry = _visit(visits, at, FORM)
            n = first + tl.arange(0, OTHER)
            p_tile = _lines(p_head, n, p_s[2], other, FORM.E, WIDE_E, not FORM.EVEN)
            q_tile = _lines(q_head, n, q_s[2], other, FORM.C, WIDE_C, not FORM.EVEN)
            scores = _dot(x, tl.trans(p_tile), nothing, FORM) * (scale * LOG2_E)
            change = _dot(y, tl.trans(q_tile), nothing, FORM)
            if ACROSS:
                if FORM.CAUSAL or FORM.MASK != "none" or not FORM.EVEN:
                    scores = _seen(scores, masks, mask_s, n[None, :], m[:, None], other, own, entry, FORM)
                levels, inners = _sums(lse + queries * other, delta + queries * other, n, other)
                weights = tl.exp2(scores - levels[None, :])
                y_sum = _dot(weights.to(q_tile.dtype), q_tile, y_sum, FORM)
                change = weights * (change - inners[None, :])
            else:
                if FORM.CAUSAL or FORM.MASK != "none" or not FORM.EVEN:
                    scores = _seen(scores, masks, mask_s, m[:, None], n[None, :], own, other, entry, FORM)
                change = tl.exp2(scores - level[:, None]) * (change - inner[:, None])
            x_sum = _dot(change.to(p_tile.dtype), p_tile, x_sum, FORM)
    e = tl.arange(0, WIDE_E)
    x_out = _at(x_out, x_out_s, batch, head) + m[:, None] * x_out_s[2] + e[None, :]
    tl.store(x_out, (x_sum * scale).to(x_out.dtype.element_ty), mask=(m[:, None] < own) & (e[None, :] < FORM.E))
    if ACROSS:
        tl.store(last, y_sum.to(last.dtype.element_ty), mask=inside)


def gradients(
    a: Arguments, grad: Tensor, out: Tensor, lse: Tensor, blocks: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention with respect to queries, keys and values, with `g` that of the output (Dao, 2023)::

        P = exp(S - lse),   dS = P * (g v^T - rowsum(g * o)),   (scale dS k,  scale dS^T q,  P^T g)

    Every sum is taken by one program in one order, so that two runs give the same bits.

    Args:
        a: queries `(b, h, l, e)`, keys `(b, h or g, s, e)`, values `(b, h or g, s, c)`, and the mask.
        grad: gradient of the output, `(b, h, l, c)`.
        out: output and `lse` log-sum-exp, as by `trigflow.tangent.attention.triton.forward`; so are the others.
    """
    totals = tuple(torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (a.q, a.k, a.v))
    if grad.numel() and a.k.shape[2]:
        q, k, v, grad, out = (unit_stride(t) for t in (a.q, a.k, a.v, grad.to(a.q.dtype), out))
        delta, (heads, groups) = torch.empty_like(lse), (q.shape[1], k.shape[1])
        sees, constants = masking(a, blocks, causal)
        strided: tuple[Tensor, ...] = (q, grad, k, v, *sees, totals[0], out)
        launch(kernel, launches, a, strided, (lse, delta), (heads, 1, heads // groups), constants)
        sees, constants = masking(a, blocks, causal, across=True)
        strided = (k, v, q, grad, *sees, *totals[1:])
        launch(kernel, launches, a, strided, (lse, delta), (groups, heads // groups, 1), {**constants, "ACROSS": True})
    return totals  # type: ignore[return-value]


def launches(wide: int, itemsize: int, across: bool, listed: bool) -> list[tuple[int, int, int, int]]:
    """As `trigflow.tangent.attention.triton.launches`."""
    first = {
        (64, 2): ((128, 64, 8, 2), (64, 128, 8, 2)),
        (128, 2): ((128, 64, 8, 2), (32, 128, 8, 2)),
        (256, 2): ((64, 32, 8, 2), (64, 32, 8, 2)),
        (64, 4): ((64, 32, 8, 2), (32, 64, 8, 2)),
        (128, 4): ((32, 32, 8, 1), (32, 32, 8, 1)),
        (256, 4): ((16, 16, 8, 1), (16, 16, 8, 1)),
    }[wide, itemsize][across]
    return [first, (64, 32, 8, 1), (32, 32, 4, 1), (16, 16, 4, 1)]
