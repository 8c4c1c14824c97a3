"""Scaled dot-product attention, primal by PyTorch's own kernels, tangent by trigflow.tangent.attention; flexible attention."""

import math
from typing import Any

import torch

from trigflow.tangent.attention import attention, attention_with_tangent
from trigflow.tangent.attention.select import fused
from trigflow.tangent.dispatch import replayed_draws, traced, unsupported
from trigflow.tangent.dual import Dual, no_grad, pair, strip
from trigflow.tangent.table import NAMES, register


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
    ours: dict[str, Any] = {"mask": mask, "causal": is_causal, "scale": scale, "grouped": enable_gqa}
    if dropout_p == 0 and fused(q, k, v, mask, dmask, is_causal, enable_gqa):
        return pair(*attention_with_tangent(q, k, v, dq, dk, dv, **ours))
    settings: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    dropped = None
    if dropout_p == 0:
        primal = func(q, k, v, mask, 0.0, is_causal, **settings)
    elif traced() is not None:  # a graph cannot draw the same mask twice
        primal, dropped = torch.ops.aten._scaled_dot_product_attention_math(q, k, v, mask, dropout_p, is_causal, **settings)
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
        return pair(primal, attention(q, k, v, dq, dk, dv, dmask=dmask, dropped=dropped, out=primal, **ours))


def flex_attention(func: Any, query: Any, key: Any, value: Any, score_mod: Any, *settings: Any) -> Any:
    """The operator behind `torch.nn.attention.flex_attention`, on the whole matrix of scores, for masks and any score function.

    With the modified scores `S`, their tangents `dS` and `P = softmax(S)`: `do = (P * dS) v + P dv - rowsum(P * dS) o`.
    Tensors that the functions hold are constants. Statistics come in units of log 2.
    """
    from torch._higher_order_ops.flex_attention import _math_attention_inner

    q, k, v = strip((query, key, value))
    with no_grad():
        dq, dk, dv = (x.tangent if type(x) is Dual else torch.zeros_like(x) for x in (query, key, value))
        groups, wide = q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
        wk, wv, dk, dv = (x.repeat_interleave(groups, 1).expand(q.shape[0], -1, -1, -1).to(wide) for x in (k, v, dk, dv))

        def scores(q: Any, k: Any) -> Any:
            return _math_attention_inner(q, k, wv, score_mod, *settings)[1].to(wide)

        try:
            s, ds, *_ = torch.func.jvp(scores, (q.to(wide), wk), (dq.to(wide), dk))
        except Exception as reason:
            first = str(reason).strip().split("\n")[0][:200]
            raise unsupported(func, f"its score function has no derivative, PyTorch says '{first}'") from reason
        p = torch.softmax(s, -1).nan_to_num(0.0)  # a row without keys attends to nothing
        moved = p * ds.masked_fill(s == -torch.inf, 0.0)
        total = moved.sum(-1)
        tangent = torch.matmul(moved, wv) + torch.matmul(p, dv) - total[..., None] * torch.matmul(p, wv)
        largest = ds.gather(-1, s.argmax(-1, keepdim=True))[..., 0]
    # The tangent first: make_fx loses tensors that the functions hold if it meets them inside of the operator first.
    primal = func(q, k, v, score_mod, *settings)
    with no_grad():
        return tuple(
            pair(x, dx) if x.shape == dx.shape else x
            for x, dx in zip(primal, (tangent, total / math.log(2), largest / math.log(2)), strict=True)
        )


NAMES["higher_order.flex_attention"] = flex_attention
register(scaled_dot_product_attention, "scaled_dot_product_attention")
