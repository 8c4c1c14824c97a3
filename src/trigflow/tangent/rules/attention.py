"""Scaled dot-product attention: primal by PyTorch's own kernels, tangent by trigflow.tangent.attention."""

from __future__ import annotations

from typing import Any

import torch

from trigflow.tangent.attention import attention, attention_with_tangent
from trigflow.tangent.attention.select import fused
from trigflow.tangent.dispatch import replayed_draws, traced, unsupported
from trigflow.tangent.dual import Dual, no_grad, pair, strip
from trigflow.tangent.table import register


def scaled_dot_product_attention(
    func: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """The primal keeps the fast backward of PyTorch's kernels (or our own, see `fused`); the tangent is off the graph."""
    q, k, v, mask = strip((query, key, value, attn_mask))
    dq, dk, dv, dmask = (t.tangent if type(t) is Dual else None for t in (query, key, value, attn_mask))
    if dropout_p == 0 and fused(q, k, v, mask, dmask, is_causal, enable_gqa):
        return pair(
            *attention_with_tangent(
                *(q, k, v, dq, dk, dv), mask=mask, causal=is_causal, scale=scale, grouped=enable_gqa
            )
        )
    settings: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    dropped = None
    if dropout_p == 0:
        primal = func(q, k, v, mask, 0.0, is_causal, **settings)
    elif traced() is not None:  # a graph cannot draw the same mask twice
        primal, dropped = torch.ops.aten._scaled_dot_product_attention_math(
            q, k, v, mask, dropout_p, is_causal, **settings
        )
    else:
        with replayed_draws(q.device, []) as draws:
            primal = func(q, k, v, mask, dropout_p, is_causal, **settings)
            draws.rewind()
            with no_grad():
                again, dropped = torch.ops.aten._scaled_dot_product_attention_math(
                    q, k, v, mask, dropout_p, is_causal, **settings
                )
                if not torch.allclose(again, primal, rtol=1e-3, atol=1e-5, equal_nan=True):
                    raise unsupported(func, "the dropout mask of this attention kernel cannot be drawn again")
    with no_grad():
        tangent = attention(
            *(q, k, v, dq, dk, dv),
            mask=mask,
            dmask=dmask,
            causal=is_causal,
            scale=scale,
            grouped=enable_gqa,
            dropped=dropped,
            out=primal,
        )
        return pair(primal, tangent)


register(scaled_dot_product_attention, "scaled_dot_product_attention")
