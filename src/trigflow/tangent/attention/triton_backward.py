# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Gradients of attention by two Triton kernels, which compute the weights again from the log-sum-exp of the scores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trigflow.tangent.attention.layout import arguments
from trigflow.tangent.attention.triton import LOG2_E, _at, _dot, _lines, _seen, _visit, launch, masking, unit_stride


@triton.jit
def queries_kernel(tensors, strides, numbers, FORM: tl.constexpr):
    """One program computes `ROWS` rows of the gradient of the queries of one head, and `delta`, their sums of `g * o`."""
    WIDE_E: tl.constexpr = FORM.WIDE_E
    WIDE_C: tl.constexpr = FORM.WIDE_C
    ROWS: tl.constexpr = FORM.ROWS
    COLUMNS: tl.constexpr = FORM.COLUMNS
    q, k, v, g, out, mask, lists, total, lse, delta = tensors
    q_s, k_s, v_s, g_s, out_s, mask_s, lists_s, total_s = strides
    heads, repeats, rows, columns, scale = numbers
    blocks = tl.cdiv(rows, ROWS)
    block = tl.program_id(0) % blocks
    if FORM.CAUSAL:
        block = blocks - 1 - block  # the rows that see most keys start first
    item = tl.program_id(0) // blocks
    batch, head = (item // heads).to(tl.int64), (item % heads).to(tl.int64)

    i = block * ROWS + tl.arange(0, ROWS)
    k, v = _at(k, k_s, batch, head // repeats), _at(v, v_s, batch, head // repeats)
    x = _lines(_at(q, q_s, batch, head), i, q_s[2], rows, FORM.E, WIDE_E, not FORM.EVEN)
    u = _lines(_at(g, g_s, batch, head), i, g_s[2], rows, FORM.C, WIDE_C, not FORM.EVEN)
    o = _lines(_at(out, out_s, batch, head), i, out_s[2], rows, FORM.C, WIDE_C, not FORM.EVEN)
    inner = tl.sum(u.to(tl.float32) * o.to(tl.float32), 1)
    place = (batch * heads + head) * rows + i
    tl.store(delta + place, inner, mask=i < rows)
    level = tl.load(lse + place, mask=i < rows, other=0.0) * LOG2_E
    level = tl.where(level == float("-inf"), 0.0, level)  # no key is seen: all scores are -inf

    end = columns
    if FORM.CAUSAL:
        end = tl.minimum(columns, (block + 1) * ROWS)
    if FORM.MASK != "none":
        mask = _at(mask, mask_s, batch, head)
    if FORM.TABLE:
        lists = _at(lists, lists_s, batch, head) + block * ROWS // FORM.BLOCK * lists_s[2]
        end = tl.load(lists) * FORM.BLOCK
    nothing = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum = tl.zeros([ROWS, WIDE_E], tl.float32)
    for at in range(0, end, COLUMNS):
        first, entry = _visit(lists, at, FORM)
        j = first + tl.arange(0, COLUMNS)
        y = _lines(k, j, k_s[2], columns, FORM.E, WIDE_E, not FORM.EVEN)
        z = _lines(v, j, v_s[2], columns, FORM.C, WIDE_C, not FORM.EVEN)
        scores = _dot(x, tl.trans(y), nothing, FORM) * (scale * LOG2_E)
        if FORM.CAUSAL or FORM.MASK != "none" or not FORM.EVEN:
            scores = _seen(scores, mask, mask_s, i[:, None], j[None, :], rows, columns, entry, FORM)
        weights = tl.exp2(scores - level[:, None])
        change = weights * (_dot(u, tl.trans(z), nothing, FORM) - inner[:, None])
        sum = _dot(change.to(y.dtype), y, sum, FORM)
    e = tl.arange(0, WIDE_E)
    total = _at(total, total_s, batch, head) + i[:, None] * total_s[2] + e[None, :]
    tl.store(total, (sum * scale).to(total.dtype.element_ty), mask=(i[:, None] < rows) & (e[None, :] < FORM.E))


@triton.jit
def keys_kernel(tensors, strides, numbers, FORM: tl.constexpr):
    """One program computes `COLUMNS` rows of the gradients of keys and values of one head, from all heads that they serve."""
    WIDE_E: tl.constexpr = FORM.WIDE_E
    WIDE_C: tl.constexpr = FORM.WIDE_C
    ROWS: tl.constexpr = FORM.ROWS
    COLUMNS: tl.constexpr = FORM.COLUMNS
    q, k, v, g, mask, lists, k_total, v_total, lse, delta = tensors
    q_s, k_s, v_s, g_s, mask_s, lists_s, k_total_s, v_total_s = strides
    heads, repeats, rows, columns, scale = numbers
    blocks, groups = tl.cdiv(columns, COLUMNS), heads // repeats
    block, item = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    batch, group = (item // groups).to(tl.int64), (item % groups).to(tl.int64)

    j = block * COLUMNS + tl.arange(0, COLUMNS)
    y = _lines(_at(k, k_s, batch, group), j, k_s[2], columns, FORM.E, WIDE_E, not FORM.EVEN)
    z = _lines(_at(v, v_s, batch, group), j, v_s[2], columns, FORM.C, WIDE_C, not FORM.EVEN)
    nothing = tl.zeros([COLUMNS, ROWS], tl.float32)
    y_sum = tl.zeros([COLUMNS, WIDE_E], tl.float32)
    z_sum = tl.zeros([COLUMNS, WIDE_C], tl.float32)
    for turn in range(repeats):
        head = group * repeats + turn
        queries, grads = _at(q, q_s, batch, head), _at(g, g_s, batch, head)
        sums = (batch * heads + head) * rows
        low, high = 0, rows
        if FORM.CAUSAL:
            low = block * COLUMNS // ROWS * ROWS
        masks, visits = mask, lists
        if FORM.MASK != "none":
            masks = _at(mask, mask_s, batch, head)
        if FORM.TABLE:
            visits = _at(lists, lists_s, batch, head) + block * COLUMNS // FORM.BLOCK * lists_s[2]
            low, high = 0, tl.load(visits) * FORM.BLOCK
        for at in range(low, high, ROWS):
            first, entry = _visit(visits, at, FORM)
            i = first + tl.arange(0, ROWS)
            x = _lines(queries, i, q_s[2], rows, FORM.E, WIDE_E, not FORM.EVEN)
            u = _lines(grads, i, g_s[2], rows, FORM.C, WIDE_C, not FORM.EVEN)
            level = tl.load(lse + sums + i, mask=i < rows, other=0.0) * LOG2_E
            level = tl.where(level == float("-inf"), 0.0, level)
            inner = tl.load(delta + sums + i, mask=i < rows, other=0.0)
            scores = _dot(y, tl.trans(x), nothing, FORM) * (scale * LOG2_E)
            if FORM.CAUSAL or FORM.MASK != "none" or not FORM.EVEN:
                scores = _seen(scores, masks, mask_s, i[None, :], j[:, None], rows, columns, entry, FORM)
            weights = tl.exp2(scores - level[None, :])
            z_sum = _dot(weights.to(u.dtype), u, z_sum, FORM)
            change = weights * (_dot(z, tl.trans(u), nothing, FORM) - inner[None, :])
            y_sum = _dot(change.to(x.dtype), x, y_sum, FORM)
    e, c = tl.arange(0, WIDE_E), tl.arange(0, WIDE_C)
    inside = j[:, None] < columns
    k_total = _at(k_total, k_total_s, batch, group) + j[:, None] * k_total_s[2] + e[None, :]
    v_total = _at(v_total, v_total_s, batch, group) + j[:, None] * v_total_s[2] + c[None, :]
    tl.store(k_total, (y_sum * scale).to(k_total.dtype.element_ty), mask=inside & (e[None, :] < FORM.E))
    tl.store(v_total, z_sum.to(v_total.dtype.element_ty), mask=inside & (c[None, :] < FORM.C))


def gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    mask: Tensor | None = None,
    blocks: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    grouped: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention with respect to queries, keys and values, with `g` that of the output (Dao, 2023)::

        P = exp(S - lse),   dS = P * (g v^T - rowsum(g * o)),   (scale dS k,  scale dS^T q,  P^T g)

    Every sum is taken by one program in one order, so that two runs give the same bits.

    Args:
        grad: gradient of the output, `(b, h, l, c)`.
        q: queries `(b, h, l, e)`; keys `(b, h or g, s, e)` and values `(b, h or g, s, c)` with as many heads.
        out: output and `lse` log-sum-exp, as by `trigflow.tangent.attention.triton.forward`; so are the others.

    Returns:
        Gradients of the shapes and dtypes of q, k and v.
    """
    a = arguments(q, k, v, None, None, None, mask, None, scale, grouped)
    totals = tuple(torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if grad.numel() == 0 or k.shape[2] == 0:
        return totals  # type: ignore[return-value]
    q, k, v, grad, out = (unit_stride(t) for t in (q, k, v, grad.to(q.dtype), out))
    delta = torch.empty_like(lse)
    repeats = (q.shape[1] // k.shape[1],)
    masks, lists, constants = masking(a, blocks, causal, across=False)
    tensors = (q, k, v, grad, out, masks, lists, totals[0])
    launch(queries_kernel, queries_launches, a, 0, tensors, (lse, delta), repeats, constants)
    masks, lists, constants = masking(a, blocks, causal, across=True)
    launch(
        keys_kernel, keys_launches, a, 1, (q, k, v, grad, masks, lists, *totals[1:]), (lse, delta), repeats, constants
    )
    return totals  # type: ignore[return-value]


def queries_launches(wide: int, itemsize: int) -> list[tuple[int, int, int, int]]:
    """As `trigflow.tangent.attention.triton.launches`."""
    return [(64, 32, 4, 2), (32, 32, 4, 1), (16, 16, 4, 1)]


def keys_launches(wide: int, itemsize: int) -> list[tuple[int, int, int, int]]:
    """As `trigflow.tangent.attention.triton.launches`."""
    return [(32, 64, 4, 2), (32, 32, 4, 1), (16, 16, 4, 1)]
