"""Chunked attention against torch.func.jvp of the formula, and what memory it takes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tangent.attention.formula import written_out
from tangent.attention.memory import Memory
from tangent.helpers import draw, reference, relative_error
from trigflow.tangent import attention_implementation, jvp
from trigflow.tangent.attention import attention, chunked, plain
from trigflow.tangent.attention.layout import arguments

SIZES = st.integers(1, 70)


def by_blocks(
    *tensors: Any, mask: Any = None, dmask: Any = None, scale: Any = None, grouped: bool = False, **rest: Any
) -> Tensor:
    return chunked.attention(arguments(*tensors, mask, dmask, scale, grouped), **rest)


def directions(*values: Tensor | None, bits: int = -1) -> tuple[Any, ...]:
    return tuple(draw(31 + i, *v.shape) if v is not None and bits >> i & 1 else None for i, v in enumerate(values))


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_equals_the_formula(data: st.DataObject) -> None:
    pick = data.draw
    b, heads, groups = pick(st.integers(1, 3)), pick(st.sampled_from((1, 2, 4))), pick(st.sampled_from((1, 2, 4)))
    groups = min(heads, groups)
    rows, keys, e, c = pick(SIZES), pick(SIZES), pick(st.integers(1, 9)), pick(st.integers(1, 9))
    q, k, v = draw(1, b, heads, rows, e), draw(2, b, groups, keys, e), draw(3, b, groups, keys, c)
    causal, kind = pick(st.booleans()), pick(st.sampled_from(("none", "boolean", "added", "added with -inf")))
    mask = None
    seen = torch.ones(b, heads, rows, keys, dtype=torch.bool)
    if kind != "none":
        shape = [n if pick(st.booleans()) else 1 for n in (b, heads, rows, keys)][pick(st.integers(0, 2)) :]
        if kind == "boolean":
            mask = draw(4, *shape) > pick(st.sampled_from((-1.0, 1.0)))
            seen = seen & mask
        else:
            mask = draw(4, *shape)
            if kind != "added":
                mask = mask.masked_fill(draw(5, *shape) > 1.0, -math.inf)
                seen = seen & (mask > -math.inf)
    if causal:
        seen = seen & torch.ones(rows, keys, dtype=torch.bool).tril()
    bits = pick(st.integers(1, 15 if kind.startswith("added") else 7))
    dq, dk, dv, dmask = directions(q, k, v, mask, bits=bits)
    scale = pick(st.sampled_from((None, 0.3)))

    value = by_blocks(
        *(q, k, v, dq, dk, dv),
        mask=mask,
        dmask=dmask,
        causal=causal,
        scale=scale,
        grouped=True,
        block=pick(st.sampled_from((1, 1024, 1 << 18))),
    )
    # Rows that see no key are zero; for the formula, let them see all.
    dead = ~seen.any(-1, keepdim=True)
    if mask is not None and mask.dtype == torch.bool:
        mask, causal = seen | dead, False
    elif dead.any():
        mask = torch.zeros(()).double().where(dead, mask.expand_as(seen).masked_fill(~seen, -math.inf))
        dmask = None if dmask is None else dmask.expand_as(seen)
        causal = False
    expected = reference(lambda q, k, v, m: written_out(q, k, v, m, causal, scale), (q, k, v, mask), (dq, dk, dv, dmask))
    expected = expected.masked_fill(dead, 0.0)
    gap = torch.linalg.vector_norm(value - expected)
    assert gap < 1e-10 * torch.linalg.vector_norm(expected) + 1e-13  # a mask moved as a whole changes nothing


@pytest.mark.parametrize("shape", [(30, 4), (3, 30, 4), (2, 3, 2, 30, 4)])
def test_any_number_of_leading_axes(shape: tuple[int, ...]) -> None:
    q, k, v = (draw(i, *shape) for i in range(3))
    tangents = directions(q, k, v)
    mask = draw(6, 30, 30) > 0
    mask[:, 0] = True
    value = by_blocks(q, k, v, *tangents, mask=mask, block=256)
    expected = reference(lambda *x: written_out(*x, mask=mask), (q, k, v), tangents)
    assert relative_error(value, expected) < 1e-12


def test_one_axis_of_keys_serves_all_entries() -> None:
    """Keys and values broadcast over the batch and the heads, as in pooling by attention."""
    q, k, v = draw(1, 3, 2, 20, 4), draw(2, 1, 1, 30, 4), draw(3, 1, 1, 30, 5)
    tangents = directions(q, k, v)
    value = by_blocks(q, k, v, *tangents, block=256)
    assert relative_error(value, plain.attention(q, k, v, *tangents)) < 1e-13


def test_empty_tensors() -> None:
    q = draw(1, 2, 3, 5, 4)
    for queries, keys in ((q[:0], q[:0]), (q[:, :, :0], q), (q, q[:, :, :0])):
        assert torch.equal(by_blocks(queries, keys, keys, queries, keys, keys), torch.zeros_like(queries))


def test_no_tangent_in_gives_zero_out() -> None:
    q = draw(1, 2, 3, 5, 4)
    assert not by_blocks(q, q, q, None, None, None).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    low = [draw(i, 2, 2, 40, 8).to(dtype) for i in range(6)]
    value = by_blocks(*low, block=256)
    exact = plain.attention(*(x.double() for x in low))
    assert value.dtype == dtype
    assert relative_error(value.double(), exact) < (4e-3 if dtype == torch.bfloat16 else 5e-4)


def test_a_known_output_changes_nothing() -> None:
    q, k, v = (draw(i, 2, 2, 40, 8) for i in range(3))
    tangents = directions(q, k, v)
    out = F.scaled_dot_product_attention(q, k, v)
    value = by_blocks(q, k, v, *tangents, out=out, block=256)
    assert relative_error(value, by_blocks(q, k, v, *tangents, block=256)) < 1e-13


def test_a_known_output_is_not_read_where_no_key_is_seen() -> None:
    q, k, v = (draw(i, 1, 1, 6, 8) for i in range(3))
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[2] = False
    out = F.scaled_dot_product_attention(q, k, v, mask)
    out[0, 0, 2] = math.nan
    value = by_blocks(q, k, v, q, k, v, mask=mask, out=out)
    assert not value[0, 0, 2].any()
    assert relative_error(value, plain.attention(q, k, v, q, k, v, mask=mask)) < 1e-13


@pytest.mark.parametrize(("rows", "keys"), [(2, 2), (17, 2), (18, 18), (17, 18), (33, 20)])
def test_causal_at_the_edges_of_blocks(rows: int, keys: int) -> None:
    q, k, v = draw(1, 1, 1, rows, 3), draw(2, 1, 1, keys, 3), draw(3, 1, 1, keys, 3)
    tangents = directions(q, k, v)
    value = by_blocks(q, k, v, *tangents, causal=True, block=256)
    expected = reference(lambda *x: written_out(*x, causal=True), (q, k, v), tangents)
    assert relative_error(value, expected) < 1e-12


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (draw(i, 1, 1, 40, 8) * (1 if i == 2 else 60) for i in range(3))
    tangents = directions(q, k, v)
    value = by_blocks(q, k, v, *tangents, block=256)
    assert relative_error(value, reference(written_out, (q, k, v), tangents)) < 1e-10


def test_nan_is_not_hidden() -> None:
    q, k, v = (draw(i, 1, 1, 40, 8) for i in range(3))
    q[0, 0, 7, 0] = math.nan
    value = attention(q, k, v, None, None, v, implementation="chunked")
    assert value[0, 0, 7].isnan().all()
    assert value[0, 0, :7].isfinite().all()


def peaks(name: str, lengths: tuple[int, ...], **settings: Any) -> list[int]:
    result = []
    for n in lengths:
        q, k, v = (draw(i, 1, 1, n, 8, dtype=torch.float32) for i in range(3))
        with attention_implementation(name), Memory() as memory:
            jvp(
                lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **settings),
                (q, k, v),
                tuple(torch.ones_like(x) for x in (q, k, v)),
            )
        assert memory.largest > 0
        result.append(memory.peak)
    return result


@pytest.mark.parametrize("name", ["chunked", "auto"])
def test_memory_is_linear_in_the_length(name: str) -> None:
    few = peaks(name, (1024, 2048, 4096, 8192))
    assert all(long < 2.2 * short for short, long in itertools.pairwise(few))
    assert few[-1] < 8192 * 8192 * 4 / 16


def test_memory_of_plain_is_not() -> None:
    few = peaks("plain", (512, 1024))
    assert few[1] > 3.5 * few[0]


def test_a_broadcast_mask_is_not_written_out() -> None:
    q = draw(1, 8, 4, 512, 4)
    mask = torch.ones(512, 512, dtype=torch.bool)
    with Memory() as memory:
        by_blocks(q, q, q, q, q, q, mask=mask)
    assert memory.largest <= q.element_size() * chunked.BLOCKS["cpu"]
    assert memory.largest < mask.element_size() * 8 * 4 * 512 * 512
