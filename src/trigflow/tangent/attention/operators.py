"""Attention as operators of `torch.library`: one node of a graph each, with a shape that is known without computing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trigflow.tangent.attention import chunked
from trigflow.tangent.attention.layout import arguments


def traced() -> bool:
    """Whether operations are being recorded (`make_fx`, `torch.compile`, `torch.export`) or have no values."""
    kinds = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(kind) is not None for kind in (kinds.PROXY, kinds.FAKE))


@torch.library.custom_op("trigflow::attention_tangent", mutates_args=())
def attention_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    mask: Tensor | None,
    dmask: Tensor | None,
    out: Tensor | None,
    causal: bool,
    scale: float | None,
    grouped: bool,
) -> Tensor:
    """`chunked.attention` as an operator. It has no derivative: detach the arguments."""
    return chunked.attention(
        q, k, v, dq, dk, dv, mask=mask, dmask=dmask, causal=causal, scale=scale, grouped=grouped, out=out
    )


@attention_tangent.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(arguments(q, k, v, None, None, None, None, None, None, rest[-1]).shape)
