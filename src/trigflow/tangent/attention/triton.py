# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Attention and its tangent in one pass of a Triton kernel, nothing larger than the output in memory.

Importing this file imports `triton`; `trigflow.tangent.attention` does so only when the kernel is about to run.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from trigflow.tangent.attention.layout import Arguments, arguments

LOG2_E = 1.4426950408889634

_FIRST: dict[tuple[torch.device, int, int, torch.dtype], int] = {}
"""Which of `launches` fits the device, once it is known."""


@triton.jit
def _lines(start, line, stride, lines, WIDTH: tl.constexpr, WIDE: tl.constexpr, BOUNDED: tl.constexpr):
    """Lines of a matrix with `WIDTH` columns as a tile with `WIDE`, zero outside the matrix."""
    column = tl.arange(0, WIDE)
    place = start + line[:, None] * stride + column[None, :]
    if BOUNDED:
        tile = tl.load(place, mask=(line[:, None] < lines) & (column[None, :] < WIDTH), other=0.0)
    elif WIDTH < WIDE:
        tile = tl.load(place, mask=column[None, :] < WIDTH, other=0.0)
    else:
        tile = tl.load(place)
    return tile


@triton.jit
def _dot(x, y, total, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """`total + x y`, widened first for Triton's interpreter, which takes the bits of bfloat16 for integers."""
    if WIDEN:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, total, input_precision=PRECISION)


@triton.jit
def kernel(
    q,
    k,
    v,
    dq,
    dk,
    dv,
    keep,
    out,
    tangent,
    q_b,
    q_h,
    q_l,
    k_b,
    k_h,
    k_l,
    v_b,
    v_h,
    v_l,
    dq_b,
    dq_h,
    dq_l,
    dk_b,
    dk_h,
    dk_l,
    dv_b,
    dv_h,
    dv_l,
    keep_b,
    out_b,
    out_h,
    out_l,
    tangent_b,
    tangent_h,
    tangent_l,
    heads,
    k_repeats,
    v_repeats,
    rows,
    columns,
    scale,
    E: tl.constexpr,
    C: tl.constexpr,
    WIDE_E: tl.constexpr,
    WIDE_C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEEP: tl.constexpr,
    MOVES_Q: tl.constexpr,
    MOVES_K: tl.constexpr,
    MOVES_V: tl.constexpr,
    STORE_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    LOG2_E: tl.constexpr,
):
    """One program computes `ROWS` rows of the output and of its tangent for one head of one entry of the batch."""
    MOVES_S: tl.constexpr = MOVES_Q or MOVES_K
    FIRST_PART: tl.constexpr = 1 if KEEP else 0
    blocks = tl.cdiv(rows, ROWS)
    block = tl.program_id(0) % blocks
    if CAUSAL:
        block = blocks - 1 - block  # the rows that see most keys start first
    item = tl.program_id(0) // blocks
    batch, head = (item // heads).to(tl.int64), (item % heads).to(tl.int64)
    k_head, v_head = head // k_repeats, head // v_repeats

    i = block * ROWS + tl.arange(0, ROWS)
    k += batch * k_b + k_head * k_h
    v += batch * v_b + v_head * v_h
    x = _lines(q + batch * q_b + head * q_h, i, q_l, rows, E, WIDE_E, True)
    if MOVES_Q:
        dx = _lines(dq + batch * dq_b + head * dq_h, i, dq_l, rows, E, WIDE_E, True)
    if MOVES_K:
        dk += batch * dk_b + k_head * dk_h
    if MOVES_V:
        dv += batch * dv_b + v_head * dv_h
    keep += batch * keep_b

    # A constant added to a row of dS changes nothing. Taking off the mean over the first keys keeps P * dS small, and with
    # it the error of rounding P * dS to half precision.
    centre = tl.zeros([ROWS], tl.float32)
    if MOVES_S:
        near = tl.arange(0, COLUMNS)
        share = tl.where(near < columns, 1.0, 0.0)
        if KEEP:
            share = tl.where(tl.load(keep + near, mask=near < columns, other=0) != 0, share, 0.0)
        share = share / tl.maximum(tl.sum(share, 0), 1.0)
        if MOVES_Q:
            mean = tl.sum(share[:, None] * _lines(k, near, k_l, columns, E, WIDE_E, True).to(tl.float32), 0)
            centre += tl.sum(dx.to(tl.float32) * mean[None, :], 1)
        if MOVES_K:
            mean = tl.sum(share[:, None] * _lines(dk, near, dk_l, columns, E, WIDE_E, True).to(tl.float32), 0)
            centre += tl.sum(x.to(tl.float32) * mean[None, :], 1)
        centre = centre * scale

    nothing = tl.zeros([ROWS, COLUMNS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    inner = tl.zeros([ROWS], tl.float32)
    moved = tl.zeros([ROWS, WIDE_C], tl.float32)
    output = tl.zeros([ROWS, WIDE_C], tl.float32)
    # Part 0 visits the blocks in which every row sees every key, part 1 those cut by the diagonal, a mask or the end.
    if CAUSAL:
        whole = tl.minimum(columns, block * ROWS + 1) // COLUMNS * COLUMNS
        end = tl.minimum(columns, (block + 1) * ROWS)
    else:
        whole = columns // COLUMNS * COLUMNS
        end = columns
    if KEEP:
        whole = 0
    for part in tl.static_range(FIRST_PART, 2):
        if part == 0:
            low, high = 0, whole
        else:
            low, high = whole, end
        for first in range(low, high, COLUMNS):
            j = first + tl.arange(0, COLUMNS)
            y = _lines(k, j, k_l, columns, E, WIDE_E, part == 1)
            z = _lines(v, j, v_l, columns, C, WIDE_C, part == 1)
            scores = _dot(x, tl.trans(y), nothing, PRECISION, WIDEN) * (scale * LOG2_E)
            if part == 1:
                seen = (j < columns)[None, :]
                if KEEP:
                    seen = seen & (tl.load(keep + j, mask=j < columns, other=0) != 0)[None, :]
                if CAUSAL:
                    seen = seen & (j[None, :] <= i[:, None])
                scores = tl.where(seen, scores, float("-inf"))
            new = tl.maximum(top, tl.max(scores, 1))
            level = new
            if part == 1:
                level = tl.where(new == float("-inf"), 0.0, new)
            weights = tl.exp2(scores - level[:, None])
            fade = tl.exp2(top - level)
            top = new
            total = total * fade + tl.sum(weights, 1)
            moved = moved * fade[:, None]
            rounded = weights.to(z.dtype)
            if MOVES_S:
                change = nothing
                if MOVES_Q:
                    change = _dot(dx, tl.trans(y), change, PRECISION, WIDEN)
                if MOVES_K:
                    dy = _lines(dk, j, dk_l, columns, E, WIDE_E, part == 1)
                    change = _dot(x, tl.trans(dy), change, PRECISION, WIDEN)
                weighted = weights * (change * scale - centre[:, None])
                inner = inner * fade + tl.sum(weighted, 1)
                moved = _dot(weighted.to(z.dtype), z, moved, PRECISION, WIDEN)
            if MOVES_S or STORE_OUT:
                output = _dot(rounded, z, output * fade[:, None], PRECISION, WIDEN)
            if MOVES_V:
                dz = _lines(dv, j, dv_l, columns, C, WIDE_C, part == 1)
                moved = _dot(rounded, dz, moved, PRECISION, WIDEN)

    # Rows that saw no key have all sums zero, and stay zero.
    total = tl.where(total == 0.0, 1.0, total)
    output = output / total[:, None]
    moved = moved / total[:, None] - (inner / total)[:, None] * output
    c = tl.arange(0, WIDE_C)
    inside = (i[:, None] < rows) & (c[None, :] < C)
    tangent += batch * tangent_b + head * tangent_h
    tl.store(tangent + i[:, None] * tangent_l + c[None, :], moved.to(tangent.dtype.element_ty), mask=inside)
    if STORE_OUT:
        out += batch * out_b + head * out_h
        tl.store(out + i[:, None] * out_l + c[None, :], output.to(out.dtype.element_ty), mask=inside)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    *,
    keep: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    grouped: bool = False,
) -> Tensor:
    """The tangent alone; arguments as for `with_output`."""
    return _launch(arguments(q, k, v, dq, dk, dv, None, None, scale, grouped), keep, causal, None)


def with_output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    *,
    keep: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    grouped: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention and its tangent in one pass over the keys, with online softmax (Dao et al., 2022)::

        o = P v,   do = (P * dS) v + P dv - rowsum(P * dS) o,   P = softmax(S),   S = scale q k^T

    Sums are kept in float32. Products of float32 follow `torch.get_float32_matmul_precision()`.

    Args:
        q: queries `(..., h, l, e)` in float16, bfloat16 or float32, with e at most 256.
        k: keys `(..., h or g, s, e)` of the same dtype.
        v: values `(..., h or g, s, c)` of the same dtype, with c at most 256.
        dq: tangent of the queries, None for zero; `dk` and `dv` likewise.
        keep: boolean `(b or 1, s)`, True for the keys that take part.
        causal: let query i see keys 0..i only.
        scale: factor of the scores; `1 / sqrt(e)` by default.
        grouped: fewer heads in k and v than in q.

    Returns:
        `(o, do)`, both `(..., h, l, c)` in the dtype of q.
    """
    a = arguments(q, k, v, dq, dk, dv, None, None, scale, grouped)
    out = _empty(a)
    tangent = _launch(a, keep, causal, out)
    return out.view(a.shape), tangent


def _empty(a: Arguments) -> Tensor:
    return torch.empty((*a.q.shape[:3], a.v.shape[3]), dtype=a.q.dtype, device=a.q.device)


def _launch(a: Arguments, keep: Tensor | None, causal: bool, out: Tensor | None) -> Tensor:
    """Run the kernel with the largest blocks that the device has room for; `out` receives the output."""
    tangent = _empty(a)
    batch, heads, rows, e = a.q.shape
    columns, c = a.k.shape[2], a.v.shape[3]
    if tangent.numel() == 0 or columns == 0:
        if out is not None:
            out.zero_()
        return tangent.zero_().view(a.shape)
    q, k, v = (_unit_stride(t) for t in (a.q, a.k, a.v))
    dq, dk, dv = (x if t is None else _unit_stride(t.to(x.dtype)) for t, x in ((a.dq, q), (a.dk, k), (a.dv, v)))
    seen = q if keep is None else keep.expand(batch, columns).contiguous().view(torch.uint8)
    store = tangent if out is None else out
    strides = [n for t in (q, k, v, dq, dk, dv) for n in t.stride()[:3]]
    strides += [seen.stride(0), *store.stride()[:3], *tangent.stride()[:3]]
    wide_e, wide_c = max(16, triton.next_power_of_2(e)), max(16, triton.next_power_of_2(c))
    choices = launches(max(wide_e, wide_c), q.element_size())
    kind = (q.device, wide_e, wide_c, q.dtype)
    for number in range(_FIRST.get(kind, 0), len(choices)):
        row_block, column_block, warps, stages = choices[number]
        grid = (triton.cdiv(rows, row_block) * batch * heads,)
        try:
            with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
                kernel[grid](
                    *(q, k, v, dq, dk, dv, seen, store, tangent),
                    *strides,
                    *(heads, heads // k.shape[1], heads // v.shape[1], rows, columns, a.scale),
                    E=e,
                    C=c,
                    WIDE_E=wide_e,
                    WIDE_C=wide_c,
                    ROWS=row_block,
                    COLUMNS=column_block,
                    CAUSAL=causal,
                    KEEP=keep is not None,
                    MOVES_Q=a.dq is not None,
                    MOVES_K=a.dk is not None,
                    MOVES_V=a.dv is not None,
                    STORE_OUT=out is not None,
                    PRECISION=_precision(q.dtype),
                    WIDEN=q.device.type == "cpu" and q.dtype == torch.bfloat16,
                    LOG2_E=LOG2_E,
                    num_warps=warps,
                    num_stages=stages,
                    enable_fp_fusion=True,
                )
        except OutOfResources:
            if number + 1 == len(choices):
                raise
            continue
        _FIRST[kind] = number
        break
    return tangent.view(a.shape)


def launches(wide: int, itemsize: int) -> list[tuple[int, int, int, int]]:
    """Queries and keys of a block, warps and pipeline stages, in the order in which to try them.

    Four tiles of keys and values and their tangents are in flight, beside two sums of the size of the output. The first
    choices fill the registers and the shared memory of a Hopper chip without spilling; smaller chips take a later one.
    """
    wide = max(64, wide)
    if itemsize == 2:
        first = {
            64: [(128, 64, 8, 3), (128, 64, 8, 2)],
            128: [(128, 64, 8, 2), (64, 32, 4, 2)],
            256: [(64, 32, 8, 2), (64, 16, 8, 2)],
        }[wide]
    else:
        first = {64: [(64, 32, 8, 2)], 128: [(64, 32, 8, 1)], 256: [(32, 16, 4, 1)]}[wide]
    return [*first, (64, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1)]


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _precision(dtype: torch.dtype) -> str:
    """How products of float32 are computed: to full precision unless TensorFloat-32 is allowed."""
    if dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee" if torch.version.hip else "tf32x3"
