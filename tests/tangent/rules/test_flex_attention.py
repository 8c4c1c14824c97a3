"""Flexible attention against differences, and products of groups against products one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tangent.helpers import draw, no_fallback, relative_error
from trigflow.tangent import TangentError, jvp

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.compile has no effect"),
    pytest.mark.filterwarnings("ignore:flex_attention called without"),
    pytest.mark.filterwarnings("ignore:.*BlockMask"),
]
Q, K, V = draw(1, 2, 4, 16, 16), draw(2, 2, 2, 16, 16), draw(3, 2, 2, 16, 16)
DQ, DK, DV = draw(4, 2, 4, 16, 16), draw(5, 2, 2, 16, 16), draw(6, 2, 2, 16, 16)
BIAS = draw(7, 4, 16, 16)
# The first query has no key at all.
MASK = create_block_mask(lambda b, h, i, j: (i > j) & (j != 5), None, None, 16, 16, device="cpu")

CASES: dict[str, tuple[Any, Any]] = {
    "plain": (None, None),
    "mask": (None, MASK),
    "soft cap": (lambda s, b, h, i, j: 3 * torch.tanh(s / 3), None),
    "bias": (lambda s, b, h, i, j: s * s * 0.1 + BIAS[h, i, j] * (i - j), MASK),
    "mask in the scores": (lambda s, b, h, i, j: torch.where(i >= j, s, -float("inf")), None),
}


def attention(name: str) -> Callable[..., Any]:
    score, mask = CASES[name]
    return lambda q, k, v: flex_attention(q, k, v, score_mod=score, block_mask=mask, enable_gqa=True, scale=0.3)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tangents", [(DQ, DK, DV), (DQ, None, None), (None, DK, None), (None, None, DV)])
def test_flex_attention(name: str, tangents: tuple[Any, ...]) -> None:
    fn, inputs, h = attention(name), (Q, K, V), 1e-5
    out, tangent = jvp(fn, inputs, tangents)
    assert torch.equal(out, fn(*inputs))
    plus, minus = (fn(*(x if dx is None else x + s * h * dx for x, dx in zip(inputs, tangents, strict=True))) for s in (1, -1))
    assert relative_error(tangent, (plus - minus) / (2 * h)) < 1e-8
    no_fallback(fn, *inputs)


def test_compiled_flex_attention() -> None:
    compiled = torch.compile(flex_attention)
    out, tangent = jvp(lambda q: compiled(q, K, V, block_mask=MASK, enable_gqa=True), (Q,), (DQ,))
    expected = jvp(lambda q: flex_attention(q, K, V, block_mask=MASK, enable_gqa=True), (Q,), (DQ,))
    assert torch.equal(out, expected[0])
    assert torch.equal(tangent, expected[1])


def test_half_precision_is_computed_in_single() -> None:
    fn, inputs, tangents = attention("bias"), (Q, K, V), (DQ, DK, DV)
    half = [tuple(x.bfloat16() for x in group) for group in (inputs, tangents)]
    tangent = jvp(fn, *half)[1]
    assert tangent.dtype == torch.bfloat16
    expected = jvp(fn, *(tuple(x.double() for x in group) for group in half))[1]
    assert relative_error(tangent.double(), expected) < 5e-3


def test_a_traced_graph() -> None:
    fn = attention("bias")
    graph = make_fx(lambda q, dq: jvp(lambda q: fn(q, K, V), (q,), (dq,)))(Q, DQ)
    for a, b in zip(graph(2 * Q, DQ), jvp(lambda q: fn(q, K, V), (2 * Q,), (DQ,)), strict=True):
        assert relative_error(a, b) < 1e-14


@pytest.mark.parametrize("part", [lambda x, *at: x[at], lambda x, *at: x.sum(), lambda x, *at: x.mean() * at[0]])
@pytest.mark.parametrize("moving", [True, False])
def test_a_tangent_in_the_score_function_is_refused(part: Any, moving: bool) -> None:
    def fn(x: Any) -> Any:
        return flex_attention(x if moving else Q, K, V, score_mod=lambda s, *at: s + part(x, *at), enable_gqa=True)

    with pytest.raises(TangentError, match="flex_attention"):
        jvp(fn, (Q,), (DQ,))


@pytest.mark.parametrize("function", [F.grouped_mm, torch._grouped_mm])
def test_products_of_groups(function: Any) -> None:
    rows, ends = 32, torch.tensor([8, 16, 16, 32], dtype=torch.int32)
    a, w, da, dw = (draw(i, *shape).bfloat16() for i, shape in enumerate([(rows, 16), (4, 16, 24), (rows, 16), (4, 16, 24)]))

    def one_by_one(a: Tensor, w: Tensor) -> Tensor:
        starts = [0, *ends.tolist()]
        return torch.cat([a[i:j] @ w[g] for g, (i, j) in enumerate(itertools.pairwise(starts))])

    for tangents in ((da, dw), (da, None), (None, dw)):
        out, tangent = jvp(lambda a, w: function(a, w, offs=ends), (a, w), tangents)
        assert torch.equal(out, function(a, w, offs=ends))
        wide = [None if x is None else x.double() for x in tangents]
        expected = jvp(one_by_one, (a.double(), w.double()), tuple(wide))[1]
        assert relative_error(tangent.double(), expected) < 1e-2
    no_fallback(lambda a, w: function(a, w, offs=ends), a, w)
