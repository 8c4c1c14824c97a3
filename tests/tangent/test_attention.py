"""Attention tangents against torch.func.jvp of the attention formula written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tangent.attention.formula import written_out
from tangent.helpers import check, draw, reference, relative_error
from trigflow.tangent import TangentError, attention_implementation, coverage, jvp
from trigflow.tangent.attention import attention


def tangents_for(*values: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if v is None else draw(31 + i, *v.shape) for i, v in enumerate(values))


Q, K, V = draw(1, 2, 4, 5, 3), draw(2, 2, 4, 7, 3), draw(3, 2, 4, 7, 6)
MASK = draw(4, 2, 1, 5, 7) > -0.5
MASK[..., 0] = True
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "boolean mask": {"mask": MASK},
    "added mask": {"mask": draw(5, 5, 7)},
    "causal": {"causal": True},
}


@pytest.mark.parametrize("implementation", ["plain", "chunked"])
@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("name", CASES)
def test_scaled_dot_product_attention(name: str, bits: int, implementation: str) -> None:
    case = CASES[name]

    def stock(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=case.get("mask"), is_causal=case.get("causal", False), scale=case.get("scale")
        )

    carry = (bool(bits & 1), bool(bits & 2), bool(bits & 4))
    tangents = tuple(t if c else None for t, c in zip(tangents_for(Q, K, V), carry, strict=True))
    expected = reference(lambda q, k, v: written_out(q, k, v, **case), (Q, K, V), tangents)
    with attention_implementation(implementation):
        check(stock, (Q, K, V), carry, expected=expected)


def test_a_mask_may_carry_a_tangent() -> None:
    mask = draw(5, 5, 7)
    expected = reference(written_out, (Q, K, V, mask), tangents_for(Q, K, V, mask))
    check(F.scaled_dot_product_attention, (Q, K, V, mask), expected=expected)
    only = (None, None, None, draw(34, 5, 7))
    check(
        F.scaled_dot_product_attention,
        (Q, K, V, mask),
        (False,) * 3 + (True,),
        expected=reference(written_out, (Q, K, V, mask), only),
    )


def test_grouped_queries() -> None:
    k, v = K[:, :2].contiguous(), V[:, :2].contiguous()
    expected = reference(written_out, (Q, k, v), tangents_for(Q, k, v))
    check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), (Q, k, v), expected=expected)


def test_two_axes_and_strided_heads() -> None:
    q, k, v = draw(1, 5, 3), draw(2, 7, 3), draw(3, 7, 6)
    check(F.scaled_dot_product_attention, (q, k, v), expected=reference(written_out, (q, k, v), tangents_for(q, k, v)))

    def heads(x: Tensor, sdpa: Any = F.scaled_dot_product_attention) -> Tensor:
        q, k, v = x.view(2, 5, 3, 4, 3).permute(2, 0, 3, 1, 4).unbind(0)
        return sdpa(q, k, v).transpose(1, 2).reshape(2, 5, 12)

    x = draw(6, 2, 5, 36)
    check(heads, (x,), expected=reference(lambda x: heads(x, written_out), (x,), tangents_for(x)))


def test_rows_without_a_key_are_zero() -> None:
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    for m in (mask, torch.zeros(5, 7, dtype=torch.float64).masked_fill(~mask, -math.inf)):
        out, tangent = jvp(lambda q: F.scaled_dot_product_attention(q, K, V, m), (Q,), (draw(9, *Q.shape),))  # noqa: B023
        assert torch.equal(out, F.scaled_dot_product_attention(Q, K, V, m))
        assert not tangent[..., 2, :].any()
        keep = [0, 1, 3, 4]
        few = jvp(lambda q: F.scaled_dot_product_attention(q, K, V), (Q,), (draw(9, *Q.shape),))[1]
        assert relative_error(tangent[..., keep, :], few[..., keep, :]) < 1e-12


def test_dropout_uses_the_mask_of_the_primal() -> None:
    """With the same draws, dropout(P) v is linear in v, and a plain run with the value moved shows the tangent."""
    step = 1e-6
    dq, dk, dv = tangents_for(Q, K, V)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.4)

    torch.manual_seed(3)
    out, tangent = jvp(run, (Q, K, V), (dq, dk, dv))
    state = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(out, run(Q, K, V))
    assert torch.equal(state, torch.get_rng_state())
    moved = []
    for sign in (1, -1):
        torch.manual_seed(3)
        moved.append(run(Q + sign * step * dq, K + sign * step * dk, V + sign * step * dv))
    assert relative_error(tangent, (moved[0] - moved[1]) / (2 * step)) < 1e-7


def test_half_precision_is_computed_in_single() -> None:
    q, k, v = (t.bfloat16() for t in (Q, K, V))
    t = tuple(x.bfloat16() for x in tangents_for(q, k, v))
    wide = [x.double() for x in (q, k, v, *t)]
    value = attention(q, k, v, *t)
    exact = reference(written_out, tuple(wide[:3]), tuple(wide[3:]))
    assert value.dtype == torch.bfloat16
    assert relative_error(value.double(), exact) < 4e-3


def test_no_tangent_in_gives_zero_out() -> None:
    assert not attention(Q, K, V, None, None, None).any()


@pytest.mark.parametrize("causal", [False, True])
def test_multi_head_attention_module(causal: bool) -> None:
    net = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x, y = draw(1, 2, 5, 8), draw(2, 2, 5, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64) if causal else None

    def run(x: Tensor, y: Tensor, need: bool = False) -> Tensor:
        return net(x, y, y, attn_mask=mask, need_weights=need)[0]

    # With the weights asked for, the module computes attention from matrix products, which torch.func.jvp can follow.
    expected = reference(lambda x, y: run(x, y, True), (x, y), tangents_for(x, y))
    check(run, (x, y), expected=expected)
    report = coverage(run, x, y)
    assert report.complete
    assert not report.fallbacks, str(report)


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first, activation="gelu")
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
    x = draw(1, 2, 5, 8)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * draw(p.numel(), *p.shape))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = reference(net, (x,), tangents_for(x))
    check(net, (x,), expected=expected)


def test_transformer_encoder_with_dropout() -> None:
    net = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True).double().train()
    x, dx = draw(1, 2, 5, 8), draw(2, 2, 5, 8)
    torch.manual_seed(1)
    out, tangent = jvp(net, (x,), (dx,))
    moved = []
    for step in (0.0, 1e-6, -1e-6):
        torch.manual_seed(1)
        moved.append(net(x + step * dx))
    assert torch.equal(out, moved[0])
    assert relative_error(tangent, (moved[1] - moved[2]) / 2e-6) < 1e-7


def test_wrong_shapes_raise_as_in_a_plain_run() -> None:
    with pytest.raises((RuntimeError, TangentError)):
        jvp(lambda q: F.scaled_dot_product_attention(q, K[..., :2], V), (Q,), (Q,))
