# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Attention, its tangent and its gradients by Triton kernels, nothing larger than the inputs in memory.

Importing this file imports `triton`; `trigflow.tangent.attention` does so only when a kernel is about to run.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from trigflow.tangent.attention import blocks as table
from trigflow.tangent.attention.layout import Arguments

LOG2_E = tl.constexpr(1.4426950408889634)

_FIRST: dict[tuple[Any, ...], int] = {}
"""Which of the launches fits the device, once it is known."""


class Form(NamedTuple):
    """What a kernel is compiled for.

    Features E of queries and keys and C of values, in widths that are powers of two; ROWS queries and COLUMNS keys of a tile,
    EVEN if none reaches over an end; MASK is none, boolean or added, with one row for all queries unless there is a TABLE of
    blocks to visit; MOVES_Q if queries have a tangent; programs that own keys, not queries, if ACROSS.
    """

    E: int
    C: int
    WIDE_E: int
    WIDE_C: int
    ROWS: int
    COLUMNS: int
    EVEN: bool
    PRECISION: str
    WIDEN: bool
    CAUSAL: bool
    MASK: str
    TABLE: bool
    MOVES_Q: bool = False
    MOVES_K: bool = False
    MOVES_V: bool = False
    STORE_OUT: bool = False
    ACROSS: bool = False
    BLOCK: int = table.BLOCK


@triton.jit
def _at(start, strides, batch, head):
    """Where the matrix of one head of one entry of the batch begins."""
    return start + batch * strides[0] + head * strides[1]


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
def _dot(x, y, total, FORM: tl.constexpr):
    """`total + x y`, widened first for Triton's interpreter, which takes the bits of bfloat16 for integers."""
    if FORM.WIDEN:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, total, input_precision=FORM.PRECISION)


@triton.jit
def _seen(scores, mask, stride, i, j, rows, columns, entry, FORM: tl.constexpr):
    """Scores to the base 2 of queries i and keys j, which lie along different axes: -inf where i does not see j.

    An odd `entry` says that the mask has a say in this block.
    """
    seen = j < columns
    if FORM.CAUSAL:
        seen = seen & (j <= i)
    if FORM.MASK != "none":
        inside = j < entry % 2 * columns
        mask += j.to(tl.int64) * stride[3]
        if FORM.TABLE:
            mask += i.to(tl.int64) * stride[2]
            inside = inside & (i < rows)
        if FORM.MASK == "boolean":
            seen = seen & (tl.load(mask, mask=inside, other=1) != 0)
        else:
            scores += tl.load(mask, mask=inside, other=0.0).to(tl.float32) * LOG2_E
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _visit(lists, at, FORM: tl.constexpr):
    """First key (or query) of the tile at position `at`, and the entry of its block in the list."""
    first, entry = at, 1
    if FORM.TABLE:
        entry = tl.load(lists + 1 + at // FORM.BLOCK)
        first = entry // 2 * FORM.BLOCK + at % FORM.BLOCK
    return first, entry


@triton.jit
def kernel(tensors, strides, numbers, FORM: tl.constexpr):
    """One program computes `ROWS` rows of the output and of its tangent for one head of one entry of the batch.

    `tensors` are q, k, v, dq, dk, dv, mask, lists, out and tangent, with their `strides`, and the log-sum-exp; `numbers` are
    heads, heads of queries for one of keys and for one of values, queries, keys and the scale.
    """
    WIDE_E: tl.constexpr = FORM.WIDE_E
    WIDE_C: tl.constexpr = FORM.WIDE_C
    ROWS: tl.constexpr = FORM.ROWS
    COLUMNS: tl.constexpr = FORM.COLUMNS
    q, k, v, dq, dk, dv, mask, lists, out, tangent, lse = tensors
    q_s, k_s, v_s, dq_s, dk_s, dv_s, mask_s, lists_s, out_s, tangent_s = strides
    heads, k_repeats, v_repeats, rows, columns, scale = numbers
    SELECTS: tl.constexpr = FORM.MASK != "none" or FORM.TABLE
    MOVES_S: tl.constexpr = FORM.MOVES_Q or FORM.MOVES_K
    FIRST_PART: tl.constexpr = 1 if SELECTS else 0
    blocks = tl.cdiv(rows, ROWS)
    block = tl.program_id(0) % blocks
    if FORM.CAUSAL:
        block = blocks - 1 - block  # the rows that see most keys start first
    item = tl.program_id(0) // blocks
    batch, head = (item // heads).to(tl.int64), (item % heads).to(tl.int64)
    k_head, v_head = head // k_repeats, head // v_repeats

    i = block * ROWS + tl.arange(0, ROWS)
    k, v = _at(k, k_s, batch, k_head), _at(v, v_s, batch, v_head)
    x = _lines(_at(q, q_s, batch, head), i, q_s[2], rows, FORM.E, WIDE_E, not FORM.EVEN)
    if FORM.MOVES_Q:
        dx = _lines(_at(dq, dq_s, batch, head), i, dq_s[2], rows, FORM.E, WIDE_E, not FORM.EVEN)
    if FORM.MOVES_K:
        dk = _at(dk, dk_s, batch, k_head)
    if FORM.MOVES_V:
        dv = _at(dv, dv_s, batch, v_head)
    if FORM.MASK != "none":
        mask = _at(mask, mask_s, batch, head)
    if FORM.TABLE:
        lists = _at(lists, lists_s, batch, head) + block * ROWS // FORM.BLOCK * lists_s[2]

    # A constant added to a row of dS changes nothing. Taking off the mean over the first keys keeps P * dS small, and with
    # it the error of rounding P * dS to half precision.
    centre = tl.zeros([ROWS], tl.float32)
    if MOVES_S:
        near = tl.arange(0, COLUMNS)
        if FORM.TABLE:
            near += tl.load(lists + 1) // 2 * FORM.BLOCK
        share = tl.where(near < columns, 1.0, 0.0)
        if FORM.MASK != "none":
            some = tl.zeros([ROWS, COLUMNS], tl.float32)
            some = _seen(some, mask, mask_s, i[:, None], near[None, :], rows, columns, 1, FORM)
            some = tl.where((some > float("-inf")) & (i < rows)[:, None], 1.0, 0.0)
            share = tl.max(some, 0)
        share = share / tl.maximum(tl.sum(share, 0), 1.0)
        if FORM.MOVES_Q:
            mean = tl.sum(share[:, None] * _lines(k, near, k_s[2], columns, FORM.E, WIDE_E, True).to(tl.float32), 0)
            centre += tl.sum(dx.to(tl.float32) * mean[None, :], 1)
        if FORM.MOVES_K:
            mean = tl.sum(share[:, None] * _lines(dk, near, dk_s[2], columns, FORM.E, WIDE_E, True).to(tl.float32), 0)
            centre += tl.sum(x.to(tl.float32) * mean[None, :], 1)
        centre = centre * scale

    nothing = tl.zeros([ROWS, COLUMNS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    inner = tl.zeros([ROWS], tl.float32)
    moved = tl.zeros([ROWS, WIDE_C], tl.float32)
    output = tl.zeros([ROWS, WIDE_C], tl.float32)
    # Part 0 visits the blocks in which every row sees every key, part 1 those cut by the diagonal, a mask or the end.
    if FORM.CAUSAL:
        whole = tl.minimum(columns, block * ROWS + 1) // COLUMNS * COLUMNS
        end = tl.minimum(columns, (block + 1) * ROWS)
    else:
        whole = columns // COLUMNS * COLUMNS
        end = columns
    if SELECTS:
        whole = 0
    if FORM.TABLE:
        end = tl.load(lists) * FORM.BLOCK
    for part in tl.static_range(FIRST_PART, 2):
        if part == 0:
            low, high = 0, whole
        else:
            low, high = whole, end
        for at in range(low, high, COLUMNS):
            first, entry = _visit(lists, at, FORM)
            j = first + tl.arange(0, COLUMNS)
            y = _lines(k, j, k_s[2], columns, FORM.E, WIDE_E, part == 1 and not FORM.EVEN)
            z = _lines(v, j, v_s[2], columns, FORM.C, WIDE_C, part == 1 and not FORM.EVEN)
            scores = _dot(x, tl.trans(y), nothing, FORM) * (scale * LOG2_E)
            if part == 1:
                scores = _seen(scores, mask, mask_s, i[:, None], j[None, :], rows, columns, entry, FORM)
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
                if FORM.MOVES_Q:
                    change = _dot(dx, tl.trans(y), change, FORM)
                if FORM.MOVES_K:
                    dy = _lines(dk, j, dk_s[2], columns, FORM.E, WIDE_E, part == 1 and not FORM.EVEN)
                    change = _dot(x, tl.trans(dy), change, FORM)
                weighted = weights * (change * scale - centre[:, None])
                inner = inner * fade + tl.sum(weighted, 1)
                moved = _dot(weighted.to(z.dtype), z, moved, FORM)
            if MOVES_S or FORM.STORE_OUT:
                output = _dot(rounded, z, output * fade[:, None], FORM)
            if FORM.MOVES_V:
                dz = _lines(dv, j, dv_s[2], columns, FORM.C, WIDE_C, part == 1 and not FORM.EVEN)
                moved = _dot(rounded, dz, moved, FORM)

    if FORM.STORE_OUT:
        tl.store(lse + (batch * heads + head) * rows + i, (top + tl.log2(total)) / LOG2_E, mask=i < rows)
    # Rows that saw no key have all sums zero, and stay zero.
    total = tl.where(total == 0.0, 1.0, total)
    output = output / total[:, None]
    moved = moved / total[:, None] - (inner / total)[:, None] * output
    c = tl.arange(0, WIDE_C)
    inside = (i[:, None] < rows) & (c[None, :] < FORM.C)
    tangent = _at(tangent, tangent_s, batch, head)
    tl.store(tangent + i[:, None] * tangent_s[2] + c[None, :], moved.to(tangent.dtype.element_ty), mask=inside)
    if FORM.STORE_OUT:
        out = _at(out, out_s, batch, head)
        tl.store(out + i[:, None] * out_s[2] + c[None, :], output.to(out.dtype.element_ty), mask=inside)


def forward(a: Arguments, blocks: Tensor | None, causal: bool, store: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Attention and its tangent in one pass over the keys, with online softmax (Dao et al., 2022)::

        o = P v,   do = (P * dS) v + P dv - rowsum(P * dS) o,   P = softmax(S),   S = scale q k^T + mask

    Sums are kept in float32. Products of float32 follow `torch.get_float32_matmul_precision()`.

    Args:
        a: queries, keys and values, all float16, bfloat16 or float32, of at most 256 features; their tangents; a mask.
        blocks: what queries see in blocks of 128, as by `trigflow.tangent.attention.blocks.blocks_of`, which by default is
            taken from a mask that differs between queries; without a mask, blocks that are not 0 are seen as a whole.
        causal: let query i see keys 0..i only.
        store: False if the tangent alone is needed; o and lse then mean nothing.

    Returns:
        `(o, do, lse)`: o and do are `(..., h, l, c)` in the dtype of q; lse is the logarithm of the sum of `exp(S)` over the
        keys, float32 `(..., h, l)`, -inf where no key is seen.
    """
    batch, heads, rows, _ = a.q.shape
    tangent = torch.empty((batch, heads, rows, a.v.shape[3]), dtype=a.q.dtype, device=a.q.device)
    out = torch.empty_like(tangent) if store else tangent
    lse = torch.full(tangent.shape[:3], -float("inf"), dtype=torch.float32, device=a.q.device)
    if tangent.numel() == 0 or a.k.shape[2] == 0:
        out.zero_(), tangent.zero_()
    else:
        q, k, v = (unit_stride(t) for t in (a.q, a.k, a.v))
        moves = [x if t is None else unit_stride(t.to(x.dtype)) for t, x in ((a.dq, q), (a.dk, k), (a.dv, v))]
        sees, constants = masking(a, blocks, causal)
        constants |= {name: t is not None for name, t in (("MOVES_Q", a.dq), ("MOVES_K", a.dk), ("MOVES_V", a.dv))}
        tensors = (q, k, v, *moves, *sees, out, tangent)
        repeats = (heads // k.shape[1], heads // v.shape[1])
        launch(kernel, launches, a, tensors, (lse,), (heads, *repeats), {**constants, "STORE_OUT": store})
    return out.view(a.shape), tangent.view(a.shape), lse.view(a.shape[:-1])


def masking(
    a: Arguments, blocks: Tensor | None, causal: bool, across: bool = False
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """The mask and the lists of blocks to visit (of queries for each block of keys with `across`), and constants of kernels."""
    mask, kind = a.mask, "none"
    per_row = mask is not None and mask.stride(2) != 0 and mask.shape[2] > 1
    if mask is not None:
        kind = "boolean" if mask.dtype == torch.bool else "added"
        mask = mask.view(torch.uint8) if kind == "boolean" else mask.float() if mask.dtype == torch.float64 else mask
        blocks = table.blocks_of(a.mask) if blocks is None and per_row else blocks  # type: ignore[arg-type]
    visits = a.q
    if blocks is not None:
        blocks = blocks.tril() if causal else blocks
        visits = table.lists(blocks.mT if across else blocks).expand(*a.q.shape[:2], -1, -1)
    return (a.q if mask is None else mask, visits), {"CAUSAL": causal, "MASK": kind, "TABLE": blocks is not None}


def launch(
    kernel: Any,
    choices: Callable[[int, int, bool, bool], list[tuple[int, int, int, int]]],
    a: Arguments,
    strided: tuple[Tensor, ...],
    packed: tuple[Tensor, ...],
    heads: tuple[int, int, int],
    constants: dict[str, Any],
) -> None:
    """Run a kernel with the first of the choices (see `launches`) that the device has room for.

    The kernel takes tensors, the strides of the first of them, and the numbers: three for the heads, of which the first counts
    programs, the length of a program's own axis (keys with ACROSS) and of the other one, and the scale.
    """
    (batch, _, rows, e), columns, c, dtype = a.q.shape, a.k.shape[2], a.v.shape[3], a.q.dtype
    wide_e, wide_c = max(16, triton.next_power_of_2(e)), max(16, triton.next_power_of_2(c))
    across = constants.get("ACROSS", False)
    own, other = (columns, rows) if across else (rows, columns)
    sizes = choices(max(64, wide_e, wide_c), a.q.element_size(), across, constants["TABLE"])
    kind = (choices, across, constants["TABLE"], a.q.device, wide_e, wide_c, dtype)
    precision, widen = _precision(dtype), a.q.device.type == "cpu" and dtype == torch.bfloat16
    for number in range(_FIRST.get(kind, 0), len(sizes)):
        tile_rows, tile_columns, warps, stages = sizes[number]
        units = (table.BLOCK, table.BLOCK) if constants["TABLE"] else (tile_rows, tile_columns)
        even = rows % units[0] == 0 and columns % units[1] == 0
        form = Form(e, c, wide_e, wide_c, tile_rows, tile_columns, even, precision, widen, **constants)
        programs = triton.cdiv(own, tile_columns if across else tile_rows) * batch * heads[0]
        strides = tuple(t.stride() for t in strided)
        try:
            with torch.cuda.device(a.q.device) if a.q.is_cuda else nullcontext():
                kernel[(programs,)](
                    *((*strided, *packed), strides, (*heads, own, other, a.scale), form),
                    num_warps=warps,
                    num_stages=stages,
                    enable_fp_fusion=True,
                )
        except OutOfResources:
            if number + 1 == len(sizes):
                raise
            continue
        _FIRST[kind] = number
        break


def launches(wide: int, itemsize: int, across: bool = False, listed: bool = False) -> list[tuple[int, int, int, int]]:
    """Queries and keys of a block, warps and pipeline stages, in the order in which to try them.

    Four tiles of keys and values and their tangents are in flight, beside two sums of the size of the output. The first
    choices fill the registers and the shared memory of a Hopper chip without spilling; smaller chips take a later one.
    """
    if itemsize == 2:
        first = {
            64: [(128, 64, 8, 3), (128, 64, 8, 2)],
            128: [(128, 32 if listed else 64, 8, 2), (64, 32, 4, 2)],
            256: [(64, 32, 8, 2), (64, 16, 8, 2)],
        }[wide]
    else:
        first = {64: [(64, 32, 8, 2)], 128: [(64, 32, 8, 1)], 256: [(32, 16, 4, 1)]}[wide]
    return [*first, (64, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1)]


def unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _precision(dtype: torch.dtype) -> str:
    """How products of float32 are computed: to full precision unless TensorFloat-32 is allowed."""
    if dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee" if torch.version.hip else "tf32x3"
